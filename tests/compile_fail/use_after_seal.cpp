// tool: clang-tidy
// expect: 'page' used after it was moved [bugprone-use-after-move
ts::Slot offend(ts::PrefixCache &cache, const ts::PageHash &hash) {
  ts::WritablePage page = cache.allocate();
  const ts::Slot slot = page.slot(0);
  const ts::SharedPage sealed = cache.seal(std::move(page), hash);
#ifdef TS_ILLEGAL
  return page.slot(1);
#endif
  return slot;
}
