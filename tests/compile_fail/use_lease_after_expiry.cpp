// tool: clang-tidy
// expect: 'lease' used after it was moved [bugprone-use-after-move
int32_t offend(ts::Leased lease) {
  ts::Transition::apply(std::move(lease), ts::Expire{});
#ifdef TS_ILLEGAL
  return lease.num_pages();
#endif
  return 0;
}
