// The text of an error, without allocation: it must also be possible when memory is what is missing.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace blockpress {

class Message {
 public:
  bool empty() const { return text_[0] == '\0'; }
  const char* text() const { return text_; }

#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  // Returns false, so that a check can end with `return message->Set(...)`.
  bool
  Set(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text_, sizeof text_, format, arguments);
    va_end(arguments);
    return false;
  }

 private:
  char text_[512] = "";
};

} // namespace blockpress
