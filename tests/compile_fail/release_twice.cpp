// tool: clang-tidy
// expect: 'page' used after it was moved [bugprone-use-after-move
void release(ts::WritablePage page) { static_cast<void>(page.id()); }
void offend(ts::PrefixCache &cache) {
  ts::WritablePage page = cache.allocate();
  release(std::move(page));
#ifdef TS_ILLEGAL
  release(std::move(page));
#endif
}
