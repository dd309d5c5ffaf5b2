// expect: 'ts::Slot::Slot(int32_t)' is private within this context
void offend(ts::BatchArrays &arrays, ts::Slot slot) {
  arrays.add_token(5, 0, slot);
#ifdef TS_ILLEGAL
  arrays.add_token(5, 0, ts::Slot(7));
#endif
}
