// An event consumes the state: the caller gives it up, visibly.
// expect: cannot bind rvalue reference of type 'ts::Decoding&&' to lvalue of type 'ts::Decoding'
ts::Finished offend(ts::Decoding &state) {
#ifdef TS_ILLEGAL
  return ts::Transition::apply(state, ts::Cancel{});
#else
  return ts::Transition::apply(std::move(state), ts::Cancel{});
#endif
}
