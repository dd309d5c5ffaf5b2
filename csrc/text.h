#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <string_view>

#include "error.h"

namespace ts {

/// `text` fit for one line of a message: control characters and bytes that are not UTF-8 as \xNN, long text cut in the middle.
std::string one_line(std::string_view text);
std::string in_quotes(std::string_view text);  ///< the same, in single quotes

/// The longest prefix of at most `max_bytes` that does not end inside a UTF-8 character.
std::string_view utf8_prefix(std::string_view text, size_t max_bytes);

/// Bytes as people read them: "512 bytes", "1.2 GiB".
std::string human_bytes(uint64_t bytes);
std::string seconds(int32_t ms);  ///< "60 s", "0.500 s"

/// Throws Error with the parts joined.
template <class... Parts>
[[noreturn]] void fail(ts_status status, const Parts &...parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(status, message.str());
}

}  // namespace ts
