// Pages that a batch in flight still reads are given back when it is committed: only the scheduler can say that it was.
// expect: is private within this context
void offend(ts::Draining draining) {
#ifdef TS_ILLEGAL
  ts::Transition::apply(std::move(draining), ts::Land{});
#else
  static_cast<void>(draining);
#endif
}
