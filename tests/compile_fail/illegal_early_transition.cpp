// A sequence that the batch behind has too never loses its pages to another, and is neither cancelled nor timed out before that batch
// is committed.
// where: TS_STATE=Decoding TS_EVENT=Preempt
// where: TS_STATE=Decoding TS_EVENT=Cancel
// where: TS_STATE=Decoding TS_EVENT=TimeOut
// where: TS_STATE=Decoding TS_EVENT=Token
// where: TS_STATE=Prefilling TS_EVENT=Preempt
// where: TS_STATE=Prefilling TS_EVENT=Cancel
// where: TS_STATE=Prefilling TS_EVENT=TimeOut
// where: TS_STATE=Prefilling TS_EVENT=Stop
// where: TS_STATE=Preempted TS_EVENT=Cancel
// where: TS_STATE=Leased TS_EVENT=Expire
// expect: no matching function for call to 'ts::Transition::apply(std::remove_reference<ts::{TS_STATE}&>::type, std::remove_reference<ts::Early<ts::{TS_EVENT}>&>::type)'
void offend(ts::TS_STATE &state, ts::Early<ts::TS_EVENT> &event) {
#ifdef TS_ILLEGAL
  static_cast<void>(ts::Transition::apply(std::move(state), std::move(event)));
#endif
  static_cast<void>(state);
  static_cast<void>(event);
}
