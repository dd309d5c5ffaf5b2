// tool: clang-tidy
// expect: 'batch' used after it was moved [bugprone-use-after-move
void offend(ts::Scheduler &scheduler, ts::Batch batch, std::span<ts::Outcome> outcomes) {
  scheduler.commit(std::move(batch), outcomes);
#ifdef TS_ILLEGAL
  scheduler.commit(std::move(batch), outcomes);
#endif
}
