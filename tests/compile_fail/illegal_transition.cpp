// Every pair of state and event that the table in events.h calls illegal.
// where: TS_STATE=Queued TS_EVENT=Chunk
// where: TS_STATE=Queued TS_EVENT=Token
// where: TS_STATE=Queued TS_EVENT=Preempt
// where: TS_STATE=Queued TS_EVENT=Stop
// where: TS_STATE=Queued TS_EVENT=Fail
// where: TS_STATE=Prefilling TS_EVENT=Admit
// where: TS_STATE=Prefilling TS_EVENT=Stop
// where: TS_STATE=Decoding TS_EVENT=Admit
// where: TS_STATE=Decoding TS_EVENT=Chunk
// where: TS_STATE=Preempted TS_EVENT=Chunk
// where: TS_STATE=Preempted TS_EVENT=Token
// where: TS_STATE=Preempted TS_EVENT=Preempt
// where: TS_STATE=Preempted TS_EVENT=Stop
// where: TS_STATE=Preempted TS_EVENT=Fail
// where: TS_STATE=Finished TS_EVENT=Admit
// where: TS_STATE=Finished TS_EVENT=Chunk
// where: TS_STATE=Finished TS_EVENT=Token
// where: TS_STATE=Finished TS_EVENT=Preempt
// where: TS_STATE=Finished TS_EVENT=Stop
// where: TS_STATE=Finished TS_EVENT=Cancel
// where: TS_STATE=Finished TS_EVENT=Fail
// where: TS_STATE=Queued TS_EVENT=Pause
// where: TS_STATE=Queued TS_EVENT=Expire
// where: TS_STATE=Prefilling TS_EVENT=Pause
// where: TS_STATE=Prefilling TS_EVENT=Expire
// where: TS_STATE=Decoding TS_EVENT=Expire
// where: TS_STATE=Preempted TS_EVENT=Pause
// where: TS_STATE=Preempted TS_EVENT=Expire
// where: TS_STATE=Leased TS_EVENT=Admit
// where: TS_STATE=Leased TS_EVENT=Chunk
// where: TS_STATE=Leased TS_EVENT=Token
// where: TS_STATE=Leased TS_EVENT=Preempt
// where: TS_STATE=Leased TS_EVENT=Stop
// where: TS_STATE=Leased TS_EVENT=Pause
// where: TS_STATE=Leased TS_EVENT=Cancel
// where: TS_STATE=Leased TS_EVENT=Fail
// where: TS_STATE=Leased TS_EVENT=TimeOut
// where: TS_STATE=Finished TS_EVENT=Pause
// where: TS_STATE=Finished TS_EVENT=Expire
// where: TS_STATE=Finished TS_EVENT=TimeOut
// where: TS_STATE=Draining TS_EVENT=Admit
// where: TS_STATE=Draining TS_EVENT=Chunk
// where: TS_STATE=Draining TS_EVENT=Token
// where: TS_STATE=Draining TS_EVENT=Preempt
// where: TS_STATE=Draining TS_EVENT=Stop
// where: TS_STATE=Draining TS_EVENT=Pause
// where: TS_STATE=Draining TS_EVENT=Expire
// where: TS_STATE=Draining TS_EVENT=Cancel
// where: TS_STATE=Draining TS_EVENT=TimeOut
// where: TS_STATE=Draining TS_EVENT=Fail
// where: TS_STATE=Queued TS_EVENT=Land
// where: TS_STATE=Prefilling TS_EVENT=Land
// where: TS_STATE=Decoding TS_EVENT=Land
// where: TS_STATE=Preempted TS_EVENT=Land
// where: TS_STATE=Leased TS_EVENT=Land
// where: TS_STATE=Finished TS_EVENT=Land
// expect: no matching function for call to 'ts::Transition::apply(std::remove_reference<ts::{TS_STATE}&>::type, std::remove_reference<ts::{TS_EVENT}&>::type)'
void offend(ts::TS_STATE &state, ts::TS_EVENT &event) {
#ifdef TS_ILLEGAL
  static_cast<void>(ts::Transition::apply(std::move(state), std::move(event)));
#endif
  static_cast<void>(state);
  static_cast<void>(event);
}
