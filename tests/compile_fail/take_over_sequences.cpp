// The sequences of a batch in flight go to the batch behind it in the scheduler alone.
// expect: is private within this context
void offend(ts::Batch &older, ts::Batch &younger) {
  static_cast<void>(older);
  static_cast<void>(younger);
#ifdef TS_ILLEGAL
  younger.running_.swap(older.running_);
#endif
}
