// expect: 'void ts::PagePool::drop_ref(int32_t)' is private within this context
void offend(ts::PagePool &pool, const ts::SharedPage &page) {
  static_cast<void>(pool);
  static_cast<void>(page);
#ifdef TS_ILLEGAL
  pool.drop_ref(page.id());
#endif
}
