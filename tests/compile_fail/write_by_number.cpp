// A slot is not a number: nobody can write to a page without holding it.
// expect: cannot convert 'const int32_t' {aka 'const int'} to 'ts::Slot'
void offend(ts::BatchArrays &arrays, const ts::SharedPage &shared) {
  const int32_t slot = shared.id() * 64;
#ifdef TS_ILLEGAL
  arrays.add_token(5, 0, slot);
#endif
  static_cast<void>(arrays);
  static_cast<void>(slot);
}
