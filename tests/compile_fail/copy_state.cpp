// expect: use of deleted function 'ts::Prefilling::Prefilling(const ts::Prefilling&)'
void offend(ts::Prefilling state) {
  static_cast<void>(state);
#ifdef TS_ILLEGAL
  const ts::Prefilling twin = state;
#endif
}
