#include "utf8.h"

#include "errors.h"

namespace diffpress {

std::u32string decoded_utf8(const std::string& text) {
  std::u32string points;
  for (std::size_t place = 0; place < text.size();) {
    const auto first = static_cast<unsigned char>(text[place++]);
    const int more = first < 0x80 ? 0 : first < 0xc2 ? -1 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : first < 0xf5 ? 3 : -1;
    char32_t point = more == 0 ? first : first & (0x3f >> more);
    bool sound = more >= 0 && text.size() - place >= static_cast<std::size_t>(more);
    for (int i = 0; sound && i < more; ++i) {
      const auto next = static_cast<unsigned char>(text[place++]);
      sound = (next & 0xc0) == 0x80;
      point = point << 6 | (next & 0x3f);
    }
    const char32_t least[] = {0, 0x80, 0x800, 0x10000};
    if (!sound || point < least[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000))
      throw UserError("the prompt is not text in UTF-8. Set the terminal to UTF-8, or write it in plain letters.");
    points.push_back(point);
  }
  return points;
}

std::string encoded_utf8(const std::u32string& text, std::size_t start, std::size_t end) {
  std::string bytes;
  for (std::size_t place = start; place < end; ++place) {
    const char32_t point = text[place];
    const int more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    const unsigned char leads[] = {0, 0xc0, 0xe0, 0xf0};
    bytes += static_cast<char>(leads[more] | point >> 6 * more);
    for (int shift = 6 * (more - 1); shift >= 0; shift -= 6) bytes += static_cast<char>(0x80 | (point >> shift & 0x3f));
  }
  return bytes;
}

}  // namespace diffpress
