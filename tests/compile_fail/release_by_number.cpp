// A page is given back by its owner's end, never by number: so it cannot be given back twice.
// expect: 'void ts::PagePool::give_back(int32_t)' is private within this context
void offend(ts::PagePool &pool, ts::WritablePage page) {
  static_cast<void>(pool);
  static_cast<void>(page);
#ifdef TS_ILLEGAL
  pool.give_back(page.id());
#endif
}
