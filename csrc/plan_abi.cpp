#include <algorithm>
#include <cstring>

#include "abi.h"
#include "text.h"

namespace ts {

void set_error(ts_error *error, std::string_view message) {
  if (error == nullptr) return;
  const std::string_view cut = utf8_prefix(message, sizeof(error->message) - 1);
  std::copy(cut.begin(), cut.end(), error->message);
  error->message[cut.size()] = '\0';
}

}  // namespace ts

extern "C" {

ts_status ts_plan_open(const char *path, ts_verify verify, ts_plan **plan, ts_error *error) {
  return ts::guarded(error, [&] {
    if (path == nullptr || plan == nullptr) ts::fail(TS_INTERNAL, "ts_plan_open: path and plan must not be NULL");
    *plan = nullptr;
    int mode = 0;  // a C caller may pass any number, which an enum of C++ must not hold
    static_assert(sizeof(mode) == sizeof(verify));
    std::memcpy(&mode, &verify, sizeof(mode));
    if (mode != TS_VERIFY_AUTO && mode != TS_VERIFY_ALWAYS) {
      ts::fail(TS_BAD_REQUEST, "ts_plan_open: verify is ", mode, ", wanted 0 (auto) or 1 (always)");
    }
    *plan = new ts_plan{ts::Plan::open(path, verify)};
  });
}

ts_status ts_plan_entry(const ts_plan *plan, const char *name, const uint8_t **data, size_t *size) {
  if (plan == nullptr || name == nullptr) return TS_BAD_REQUEST;
  const ts::Entry *entry = plan->plan->find(name);
  if (entry == nullptr) return TS_BAD_REQUEST;
  if (data != nullptr) *data = entry->bytes.data();
  if (size != nullptr) *size = entry->bytes.size();
  return TS_OK;
}

int32_t ts_plan_num_ranks(const ts_plan *plan) { return plan == nullptr ? 0 : plan->plan->mesh().num_ranks(); }

void ts_plan_close(ts_plan *plan) { delete plan; }

}  // extern "C"
