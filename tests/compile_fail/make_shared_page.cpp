// expect: 'ts::SharedPage::SharedPage(ts::PagePool*, int32_t)' is private within this context
void offend(ts::PagePool &pool) {
  static_cast<void>(pool);
#ifdef TS_ILLEGAL
  const ts::SharedPage page(&pool, 3);
#endif
}
