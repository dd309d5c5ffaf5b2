// Sealing consumes the page.
// expect: cannot bind rvalue reference of type 'ts::WritablePage&&' to lvalue of type 'ts::WritablePage'
void offend(ts::PrefixCache &cache, const ts::PageHash &hash) {
  ts::WritablePage page = cache.allocate();
#ifdef TS_ILLEGAL
  const ts::SharedPage sealed = cache.seal(page, hash);
#else
  const ts::SharedPage sealed = cache.seal(std::move(page), hash);
#endif
}
