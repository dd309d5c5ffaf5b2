#pragma once

#include <cstdint>

namespace ts {

class PagePool;

/// Where one token's K and V are written: page * page_size + offset. Only a WritablePage makes one.
class Slot {
 public:
  int32_t value() const { return value_; }

 private:
  friend class WritablePage;
  explicit Slot(int32_t value) : value_(value) {}

  int32_t value_;
};

/// A page that one owner may write. Move-only; only the pool makes one. It ends in one of two ways: PrefixCache::seal
/// consumes it and gives a SharedPage, or its destructor gives it back to the pool, its content forgotten.
class WritablePage {
 public:
  WritablePage(WritablePage &&other) noexcept;
  WritablePage &operator=(WritablePage &&other) noexcept;
  WritablePage(const WritablePage &) = delete;
  WritablePage &operator=(const WritablePage &) = delete;
  ~WritablePage();

  int32_t id() const;
  int32_t number() const;           ///< what the page table says: its number among the pages of all pools
  Slot slot(int32_t offset) const;  ///< offset in [0, page_size)

 private:
  friend class PagePool;
  WritablePage(PagePool *pool, int32_t id) : pool_(pool), id_(id) {}

  PagePool *pool_;  // nullptr: moved from
  int32_t id_;
};

/// One reference to a full page that nobody can write any more. Move-only: a second reference is made by share(), in
/// plain sight. The destructor gives the reference back; after the last one the page is free, or idle if the prefix
/// cache can still find it.
class SharedPage {
 public:
  SharedPage(SharedPage &&other) noexcept;
  SharedPage &operator=(SharedPage &&other) noexcept;
  SharedPage(const SharedPage &) = delete;
  SharedPage &operator=(const SharedPage &) = delete;
  ~SharedPage();

  int32_t id() const;
  int32_t number() const;  ///< as WritablePage's
  SharedPage share() const;

 private:
  friend class PagePool;
  SharedPage(PagePool *pool, int32_t id) : pool_(pool), id_(id) {}

  PagePool *pool_;  // nullptr: moved from
  int32_t id_;
};

}  // namespace ts
