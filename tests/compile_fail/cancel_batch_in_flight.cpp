// expect: no matching function for call to 'ts::Transition::apply(ts::Batch, ts::Cancel)'
void offend(ts::Scheduler &scheduler, ts::Batch batch) {
#ifdef TS_ILLEGAL
  static_cast<void>(ts::Transition::apply(static_cast<ts::Batch &&>(batch), ts::Cancel{}));
#endif
  scheduler.fail(std::move(batch), "cancelled");
}
