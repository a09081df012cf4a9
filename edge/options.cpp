#include "options.h"

#include <getopt.h>

#include <cmath>
#include <cstdlib>
#include <limits>

#include "errors.h"

namespace diffpress {

const char* const kHelp =
    "Makes one image from the bundle this program lies in, without Python.\n"
    "\n"
    "  ./diffpress-run --prompt TEXT --out IMAGE.png     where the pipeline draws prompts\n"
    "  ./diffpress-run --label CLASS --out IMAGE.png     where it draws classes, by number or name\n"
    "  ./diffpress-run --out IMAGE.png                   where it takes neither\n"
    "\n"
    "  --out FILE.png    PNG file to write\n"
    "  --steps N         sampling steps; left out: what it was made for\n"
    "  --seed N          seed of the noise, the one that torch would draw; left out: 0\n"
    "  --guidance X      guidance scale; left out: the default\n"
    "  --threads N       threads to compute with; left out: one a core\n"
    "  --bench           time five images and print one JSON object\n"
    "  --selftest        make the image that came with the bundle and compare\n"
    "  --help            this text\n"
    "\n"
    "Exit status: 0 done, 1 an internal fault, 2 the input is wrong.\n";

namespace {

std::uint64_t whole(const std::string& option, const std::string& text, std::uint64_t least, std::uint64_t most) {
  const bool decimal = !text.empty() && text.size() < 20 && text.find_first_not_of("0123456789") == std::string::npos;
  const std::uint64_t found = decimal ? std::stoull(text) : 0;
  if (!decimal || found < least || found > most)
    throw UserError("--" + option + " " + text + " must be a whole number from " + std::to_string(least) + " to " + std::to_string(most) + ".");
  return found;
}

double finite(const std::string& option, const std::string& text) {
  char* end;
  const double found = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(found) || found < 0)
    throw UserError("--" + option + " " + text + " must be a finite number, 0 or more, such as 7.5.");
  return found;
}

void check(const Options& options) {
  if (options.prompt && options.label) throw UserError("give --prompt or --label, not both.");
  if (options.help || options.bench || options.self_test) return;
  if (!options.out) throw UserError("--out is missing: name the PNG file to write.");
  const std::string& out = *options.out;
  if (out.size() < 5 || out.compare(out.size() - 4, 4, ".png") != 0) throw UserError("--out " + out + " must end in .png.");
}

}  // namespace

Options parse_options(int count, char** arguments) {
  const option known[] = {{"prompt", required_argument, nullptr, 'p'},  {"label", required_argument, nullptr, 'l'},
                          {"out", required_argument, nullptr, 'o'},     {"steps", required_argument, nullptr, 'n'},
                          {"seed", required_argument, nullptr, 's'},    {"guidance", required_argument, nullptr, 'g'},
                          {"threads", required_argument, nullptr, 't'}, {"bench", no_argument, nullptr, 'b'},
                          {"selftest", no_argument, nullptr, 'c'},      {"help", no_argument, nullptr, 'h'},
                          {nullptr, 0, nullptr, 0}};
  Options found;
  opterr = 0;
  for (int place = 1, letter; (letter = getopt_long(count, arguments, ":h", known, nullptr)) != -1; place = optind) {
    const std::string value = optarg ? optarg : "";
    switch (letter) {
      case 'p': found.prompt = value; break;
      case 'l': found.label = value; break;
      case 'o': found.out = value; break;
      case 'n': found.wanted.steps = whole("steps", value, 1, 10000); break;
      case 's': found.wanted.seed = whole("seed", value, 0, std::numeric_limits<std::int64_t>::max()); break;
      case 'g': found.wanted.guidance_scale = finite("guidance", value); break;
      case 't': found.threads = static_cast<int>(whole("threads", value, 1, 1024)); break;
      case 'b': found.bench = true; break;
      case 'c': found.self_test = true; break;
      case 'h': found.help = true; break;
      case ':': throw UserError(std::string(arguments[optind - 1]) + " needs a value; --help says which.");
      default: throw UserError(std::string(arguments[place]) + " is no option; --help lists them.");
    }
  }
  if (optind < count) throw UserError(std::string(arguments[optind]) + " is no option; --help lists them.");
  check(found);
  return found;
}

}  // namespace diffpress
