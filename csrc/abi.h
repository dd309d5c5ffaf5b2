#pragma once

#include <exception>
#include <new>
#include <utility>

#include "error.h"
#include "plan.h"

/// What ts_plan points to, for plan_abi.cpp and engine_abi.cpp.
struct ts_plan {
  std::shared_ptr<const ts::Plan> plan;
};

namespace ts {

/// Writes `message` into `error` (NULL is fine), cut at a character's end.
void set_error(ts_error *error, std::string_view message);

/// Runs `body` and turns what it throws into a status and a message: no exception crosses the C ABI.
template <class Body>
ts_status guarded(ts_error *error, Body &&body) {
  try {
    std::forward<Body>(body)();
    set_error(error, "");
    return TS_OK;
  } catch (const Error &e) {
    set_error(error, e.what());
    return e.status();
  } catch (const std::bad_alloc &) {
    set_error(error, "out of memory");
    return TS_NO_MEMORY;
  } catch (const std::exception &e) {
    set_error(error, e.what());
    return TS_INTERNAL;
  } catch (...) {
    set_error(error, "an unknown exception");
    return TS_INTERNAL;
  }
}

}  // namespace ts
