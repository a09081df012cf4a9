#include "image_files.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "errors.h"

#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#endif
#include "third_party/stb/stb_image_write.h"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

namespace diffpress {

std::string png_of(const Image& image) {
  std::string levels(image.pixels.size(), '\0');
  // Halves to the even level, as numpy rounds.
  for (std::size_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<char>(static_cast<int>(std::nearbyint(image.pixels[i] * 255)));
  std::string bytes;
  const auto append = [](void* to, void* from, int count) {
    static_cast<std::string*>(to)->append(static_cast<char*>(from), static_cast<std::size_t>(count));
  };
  const int width = static_cast<int>(image.width), channels = static_cast<int>(image.channels);
  if (channels > 4 || !stbi_write_png_to_func(append, &bytes, width, static_cast<int>(image.height), channels, levels.data(), width * channels))
    throw UserError("an image of " + std::to_string(channels) + " channels cannot be written as PNG.");
  return bytes;
}

Image parse_npy(const std::string& bytes) {
  const auto damaged = [](bool wrong) {
    if (wrong) throw UserError("the self test's image is damaged. Unzip the bundle again.");
  };
  constexpr std::size_t start = 10;
  damaged(bytes.size() < start || bytes.compare(0, 8, std::string("\x93NUMPY\x01\x00", 8)) != 0);
  const std::size_t length = static_cast<unsigned char>(bytes[8]) | static_cast<std::size_t>(static_cast<unsigned char>(bytes[9])) << 8;
  damaged(bytes.size() - start < length);
  const std::string header = bytes.substr(start, length);
  long long height = 0, width = 0, channels = 0;
  const std::size_t shape = header.find("'shape': (");
  damaged(header.find("'descr': '<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos);
  damaged(shape == std::string::npos ||
          std::sscanf(header.c_str() + shape, "'shape': (%9lld, %9lld, %9lld)", &height, &width, &channels) != 3);
  constexpr long long longest = 1 << 16;
  damaged(height < 1 || width < 1 || channels < 1 || height > longest || width > longest || channels > 4);
  const auto count = static_cast<std::size_t>(height * width * channels);
  damaged(bytes.size() - start - length != count * sizeof(float));
  Image image{height, width, channels, std::vector<float>(count)};
  std::memcpy(image.pixels.data(), bytes.data() + start + length, count * sizeof(float));
  return image;
}

}  // namespace diffpress
