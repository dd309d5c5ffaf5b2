// A state comes from an event, not from a constructor.
// expect: is private within this context
void offend(std::unique_ptr<ts::Sequence> sequence) {
#ifdef TS_ILLEGAL
  const ts::Preempted state(std::move(sequence));
#else
  const ts::Queued state(std::move(sequence));
#endif
}
