// A reference to a shared page is made in plain sight, by share().
// expect: use of deleted function 'ts::SharedPage::SharedPage(const ts::SharedPage&)'
void offend(const ts::SharedPage &page) {
  const ts::SharedPage second = page.share();
#ifdef TS_ILLEGAL
  const ts::SharedPage third = page;
#endif
}
