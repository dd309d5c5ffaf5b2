// Committing consumes the batch.
// expect: cannot bind rvalue reference of type 'ts::Batch&&' to lvalue of type 'ts::Batch'
void offend(ts::Scheduler &scheduler, ts::Batch &batch, std::span<ts::Outcome> outcomes) {
#ifdef TS_ILLEGAL
  scheduler.commit(batch, outcomes);
#else
  scheduler.commit(std::move(batch), outcomes);
#endif
}
