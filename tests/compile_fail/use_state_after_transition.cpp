// tool: clang-tidy
// expect: 'state' used after it was moved [bugprone-use-after-move
void offend(ts::Decoding state) {
  const ts::Preempted preempted = ts::Transition::apply(std::move(state), ts::Preempt{});
#ifdef TS_ILLEGAL
  const ts::Finished finished = ts::Transition::apply(std::move(state), ts::Cancel{});
#endif
}
