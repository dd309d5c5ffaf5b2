// expect: use of deleted function 'ts::WritablePage& ts::WritablePage::operator=(const ts::WritablePage&)'
void offend(ts::PrefixCache &cache) {
  const ts::WritablePage page = cache.allocate();
  ts::WritablePage other = cache.allocate();
#ifdef TS_ILLEGAL
  other = page;
#endif
}
