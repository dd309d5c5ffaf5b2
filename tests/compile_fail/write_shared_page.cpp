// Only a writable page says where a token is written.
// expect: 'const class ts::SharedPage' has no member named 'slot'
void offend(ts::BatchArrays &arrays, const ts::WritablePage &writable, const ts::SharedPage &shared) {
  arrays.add_token(5, 0, writable.slot(0));
#ifdef TS_ILLEGAL
  arrays.add_token(5, 0, shared.slot(0));
#endif
  static_cast<void>(shared);
}
