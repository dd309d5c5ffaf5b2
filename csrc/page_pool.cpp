#include "page_pool.h"

#include <utility>

#include "check.h"

namespace ts {

// ---- pages ----------------------------------------------------------------------------------------------------------

WritablePage::WritablePage(WritablePage &&other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}

WritablePage &WritablePage::operator=(WritablePage &&other) noexcept {
  WritablePage taken = std::move(other);  // first: other may be this one
  std::swap(pool_, taken.pool_);
  std::swap(id_, taken.id_);
  return *this;
}

WritablePage::~WritablePage() {
  if (pool_ != nullptr) pool_->give_back(id_);
}

SharedPage::SharedPage(SharedPage &&other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}

SharedPage &SharedPage::operator=(SharedPage &&other) noexcept {
  SharedPage taken = std::move(other);  // first: other may be this one
  std::swap(pool_, taken.pool_);
  std::swap(id_, taken.id_);
  return *this;
}

SharedPage::~SharedPage() {
  if (pool_ != nullptr) pool_->drop_ref(id_);
}

int32_t SharedPage::number() const { return pool_->first_page() + id(); }

int32_t SharedPage::id() const {
  TS_ASSERT(pool_ != nullptr, "a shared page was used after it was moved from");
  return id_;
}

SharedPage SharedPage::share() const {
  TS_ASSERT(pool_ != nullptr, "a shared page was used after it was moved from");
  pool_->add_ref(id_);
  return {pool_, id_};
}

// ---- pool -----------------------------------------------------------------------------------------------------------

PagePool::PagePool(int32_t num_pages, int32_t page_size, int32_t first_page)
    : page_size_(page_size), first_page_(first_page) {
  TS_ASSERT(num_pages >= 1 && page_size >= 1, "a pool has pages, and pages have slots");
  TS_ASSERT((int64_t{first_page} + num_pages) * page_size <= INT32_MAX, "slots are int32");
  frames_.resize(static_cast<size_t>(num_pages));
  for (int32_t page = num_pages - 1; page >= 0; --page) push_blank(page);  // so that page 0 is the first to be taken
}

PagePool::~PagePool() { TS_ASSERT(num_available() == num_pages(), "a page outlived its pool"); }

WritablePage PagePool::take_blank() {
  TS_ASSERT(num_blank_ > 0, "no blank page is left");
  const int32_t page = first_blank_;
  Frame &f = frame(page);
  TS_ASSERT(f.state == State::blank && f.num_refs == 0, "a page on the blank list is in use");
  first_blank_ = f.newer;
  --num_blank_;
  f.state = State::writable;
  return {this, page};
}

WritablePage PagePool::take_idle(int32_t page) {
  unlink_idle(page);
  frame(page).findable = false;
  frame(page).state = State::writable;
  return {this, page};
}

SharedPage PagePool::take_shared(int32_t page) {
  Frame &f = frame(page);
  TS_ASSERT(f.findable, "only a page that the prefix cache indexes can be found");
  if (f.state == State::idle) {
    unlink_idle(page);
    f.state = State::shared;
  }
  f.again = true;
  add_ref(page);
  return {this, page};
}

SharedPage PagePool::seal(WritablePage &&page, bool findable, bool again) {
  TS_ASSERT(page.pool_ == this, "a page was sealed in another pool than its own, or twice");
  const int32_t id = page.id_;
  Frame &f = frame(id);
  TS_ASSERT(f.state == State::writable && f.num_refs == 0, "only a writable page can be sealed");
  page.pool_ = nullptr;
  f.state = State::shared;
  f.findable = findable;
  f.again = again;
  f.num_refs = 1;
  return {this, id};
}

void PagePool::set_unfindable(int32_t page) {
  Frame &f = frame(page);
  TS_ASSERT(f.findable && (f.state == State::shared || f.state == State::idle), "only a sealed page is findable");
  f.findable = false;
  if (f.state == State::idle) {
    unlink_idle(page);
    push_blank(page);
  }
}

void PagePool::give_back(int32_t page) {
  TS_ASSERT(frame(page).state == State::writable, "only a writable page is given back");
  push_blank(page);
}

void PagePool::add_ref(int32_t page) {
  Frame &f = frame(page);
  TS_ASSERT(f.state == State::shared && f.num_refs >= 0, "only a shared page has references");
  ++f.num_refs;
}

void PagePool::drop_ref(int32_t page) {
  Frame &f = frame(page);
  TS_ASSERT(f.state == State::shared && f.num_refs > 0, "a reference was given back twice");
  if (--f.num_refs > 0) return;
  if (f.findable) {
    push_idle(page);
  } else {
    push_blank(page);
  }
}

void PagePool::push_blank(int32_t page) {
  Frame &f = frame(page);
  TS_ASSERT(!f.findable && f.num_refs == 0, "a blank page is neither referenced nor findable");
  f.state = State::blank;
  f.older = kNone;
  f.newer = first_blank_;
  first_blank_ = page;
  ++num_blank_;
}

void PagePool::push_idle(int32_t page) {
  Frame &f = frame(page);
  TS_ASSERT(f.findable && f.num_refs == 0, "an idle page is findable and not referenced");
  f.state = State::idle;
  List &list = list_of(f);
  f.older = list.newest;
  f.newer = kNone;
  (list.newest == kNone ? list.oldest : frame(list.newest).newer) = page;
  list.newest = page;
  ++list.count;
  if (again_.count > num_pages() - num_pages() / 4) {
    const int32_t demoted = again_.oldest;
    unlink_idle(demoted);
    frame(demoted).again = false;
    push_idle(demoted);
  }
}

void PagePool::unlink_idle(int32_t page) {
  Frame &f = frame(page);
  List &list = list_of(f);
  TS_ASSERT(f.state == State::idle && list.count > 0, "only an idle page leaves the idle list");
  if (f.older == kNone) {
    TS_ASSERT(list.oldest == page, "the idle list is torn at its old end");
    list.oldest = f.newer;
  } else {
    frame(f.older).newer = f.newer;
  }
  if (f.newer == kNone) {
    TS_ASSERT(list.newest == page, "the idle list is torn at its new end");
    list.newest = f.older;
  } else {
    frame(f.newer).older = f.older;
  }
  f.older = f.newer = kNone;
  --list.count;
}

void PagePool::check() const {
  int32_t num_blank = 0;
  int32_t num_idle = 0;
  for (const Frame &f : frames_) {
    TS_ASSERT((f.num_refs > 0) == (f.state == State::shared), "exactly the shared pages have references");
    TS_ASSERT(!f.findable || f.state == State::shared || f.state == State::idle, "only a sealed page is findable");
    TS_ASSERT(f.state != State::idle || f.findable, "an idle page that nobody can find is lost");
    num_blank += f.state == State::blank ? 1 : 0;
    num_idle += f.state == State::idle ? 1 : 0;
  }
  TS_ASSERT(num_blank == num_blank_ && num_idle == this->num_idle(), "the counts of free pages are right");
  for (int32_t page = first_blank_; page != kNone; page = frames_[static_cast<size_t>(page)].newer) {
    TS_ASSERT(frames_[static_cast<size_t>(page)].state == State::blank && --num_blank >= 0, "the blank list is whole");
  }
  TS_ASSERT(check_idle(once_, false) + check_idle(again_, true) == num_idle && num_blank == 0,
            "every free page is on its list");
}

/// How many pages the list has.
int32_t PagePool::check_idle(const List &list, bool again) const {
  int32_t older = kNone, count = 0;
  for (int32_t page = list.oldest; page != kNone; page = frames_[static_cast<size_t>(page)].newer, ++count) {
    const Frame &f = frames_[static_cast<size_t>(page)];
    TS_ASSERT(f.state == State::idle && f.again == again && f.older == older && count < list.count,
              "the idle list is whole");
    older = page;
  }
  TS_ASSERT(older == list.newest && count == list.count, "the idle list has all that it counts");
  return count;
}

}  // namespace ts
