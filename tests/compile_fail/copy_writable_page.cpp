// A page that may be written has one owner.
// expect: use of deleted function 'ts::WritablePage::WritablePage(const ts::WritablePage&)'
void offend(ts::PrefixCache &cache) {
  const ts::WritablePage page = cache.allocate();
#ifdef TS_ILLEGAL
  const ts::WritablePage twin = page;
#endif
}
