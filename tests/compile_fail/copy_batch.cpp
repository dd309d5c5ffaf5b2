// expect: use of deleted function 'ts::Batch::Batch(const ts::Batch&)'
void offend(ts::Batch &batch) {
  static_cast<void>(batch);
#ifdef TS_ILLEGAL
  const ts::Batch twin(batch);
#endif
}
