// Numbers out of bytes, never past their end.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "errors.h"

namespace diffpress {

class Reader {
 public:
  Reader(const std::string& bytes, std::string what) : bytes_(bytes), what_(std::move(what)) {}

  [[noreturn]] void damaged() const { throw UserError(what_ + " of this bundle is damaged. Unzip the bundle again."); }

  void expect(const std::string& mark) {
    if (bytes_.compare(place_, mark.size(), mark) != 0) damaged();
    place_ += mark.size();
  }

  std::uint32_t word() {
    if (bytes_.size() - place_ < 4) damaged();
    std::uint32_t found = 0;
    for (int i = 3; i >= 0; --i) found = found << 8 | static_cast<unsigned char>(bytes_[place_ + i]);
    place_ += 4;
    return found;
  }

  std::uint32_t below(std::uint32_t limit) {
    const std::uint32_t found = word();
    if (found >= limit) damaged();
    return found;
  }

  // How many of something follow, each of which takes four bytes or more.
  std::uint32_t count() {
    const std::uint32_t found = word();
    if (found > (bytes_.size() - place_) / 4) damaged();
    return found;
  }

  std::vector<std::uint32_t> words() {
    std::vector<std::uint32_t> found(count());
    for (std::uint32_t& value : found) value = word();
    return found;
  }

  std::u32string points() {
    std::u32string found(count(), U'\0');
    for (char32_t& value : found) value = below(0x110000);
    return found;
  }

  void end() const {
    if (place_ != bytes_.size()) damaged();
  }

 private:
  const std::string& bytes_;
  std::string what_;
  std::size_t place_ = 0;
};

}  // namespace diffpress
