// Only the pool makes a page.
// expect: 'ts::WritablePage::WritablePage(ts::PagePool*, int32_t)' is private within this context
void offend(ts::PagePool &pool) {
  static_cast<void>(pool);
#ifdef TS_ILLEGAL
  const ts::WritablePage page(&pool, 3);
#endif
}
