// The pages that a step reads belong to its batch until it is committed: nobody else can reach the states that hold
// them.
// expect: is private within this context
void offend(ts::Batch &batch) {
  static_cast<void>(batch);
#ifdef TS_ILLEGAL
  batch.running_.clear();
#endif
}
