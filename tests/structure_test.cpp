// The rooms of the tree and the arrows between them: which directory may include what (CONTRIBUTING.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Tree = std::map<std::string, std::string>;  // path from the root of the tree -> contents

/// A room may include itself, and the rooms and files that it lists.
struct Room {
    std::string directory;
    std::set<std::string> may_include;
};

const std::string headers = "include/deeppcr/", nn_headers = "include/deeppcr/nn/";
const std::vector<Room> rooms = {
    {nn_headers, {headers}},
    {headers, {}},
    {"src/device/",
     {headers + "array.hpp", headers + "device.cuh", headers + "error.hpp", headers + "execution.hpp",
      headers + "launch.cuh", headers + "storage.hpp"}},
    {"src/distribute/",
     {"src/device/", headers + "array.hpp", headers + "device.cuh", headers + "error.hpp", headers + "execution.hpp",
      headers + "group.hpp", headers + "launch.cuh", headers + "storage.hpp"}},
    {"src/reduce/",
     {"src/device/", "src/distribute/", headers + "array.hpp", headers + "bidiagonal.hpp", headers + "device.cuh",
      headers + "error.hpp", headers + "execution.hpp", headers + "group.hpp", headers + "launch.cuh",
      headers + "storage.hpp"}},
    {"src/recurrence/",
     {"src/device/", headers + "array.hpp", headers + "cell.cuh", headers + "cell.hpp", headers + "cell_device.hpp",
      headers + "cell_kernels.hpp", headers + "cells.hpp", headers + "dense_cells.hpp", headers + "dense_chain.hpp",
      headers + "device.cuh", headers + "error.hpp", headers + "execution.hpp", headers + "launch.cuh",
      headers + "recurrence.hpp", headers + "scalar.hpp", headers + "storage.hpp"}},
    {"src/newton/", {"src/reduce/", "src/recurrence/", "src/distribute/", "src/device/", headers}},
    {"files/", {headers + "array.hpp", headers + "error.hpp"}},
    {"nn/", {headers, nn_headers, "files/"}},
    {"cli/", {headers, nn_headers, "files/"}},
    {"examples/", {headers, nn_headers}},
};

/// Libraries that only some places may see: where the prefix of an include names one, the file must be in one of those.
struct Library {
    std::string name;
    std::regex include, allowed;
};
const std::vector<Library> libraries = {
    {"LibTorch", std::regex("(torch|ATen|c10|caffe2)/.*"),
     std::regex("nn/.*|include/deeppcr/nn/.*|tests/nn_.*|benchmarks/nn_.*|examples/long_series.cpp")},
    {"Highway", std::regex("hwy/.*"), std::regex("src/.*")},
    {"CLI11", std::regex("CLI/.*"), std::regex("cli/.*|nn/.*|benchmarks/.*")},
    {"MPI", std::regex("mpi.*\\.h"), std::regex("src/distribute/mpi.cpp|tests/group_failures.cpp")},
    {"CUDA", std::regex("cuda.*|cub/.*|nccl.h"), std::regex(".*\\.cuh?|tests/emulation/.*")},
    {"GoogleTest", std::regex("(gtest|gmock|rapidcheck)[/.].*"), std::regex("tests/.*")},
};

const Room* room_of(const std::string& file) {
    const auto room =
        std::find_if(rooms.begin(), rooms.end(), [&](const Room& r) { return file.starts_with(r.directory); });
    return room == rooms.end() ? nullptr : &*room;
}

bool may_include(const Room& room, const std::string& file) {
    const Room* const other = room_of(file);
    return other == &room || room.may_include.contains(file) ||
           (other != nullptr && room.may_include.contains(other->directory));
}

std::vector<std::string> includes(const std::string& contents) {
    static const std::regex line(R"re(^\s*#\s*include\s*[<"]([^>"]+)[>"])re", std::regex::multiline);
    std::vector<std::string> found;
    for (std::sregex_iterator i(contents.begin(), contents.end(), line), end; i != end; ++i) found.push_back((*i)[1]);
    return found;
}

/// The file of the tree that `include` in `file` means, or nothing where it is some library's.
std::optional<std::string> resolve(const Tree& tree, const std::string& file, const std::string& include) {
    for (const fs::path& directory : {fs::path(file).parent_path(), fs::path("src"), fs::path(), fs::path("include")}) {
        const std::string path = (directory / include).lexically_normal().generic_string();
        if (tree.contains(path)) return path;
    }
    return std::nullopt;
}

/// Every include that goes against an arrow, as "file includes what: why not".
std::vector<std::string> violations(const Tree& tree) {
    std::vector<std::string> found;
    for (const auto& [file, contents] : tree) {
        const Room* const room = room_of(file);
        for (const std::string& include : includes(contents)) {
            const auto target = resolve(tree, file, include);
            if (target && room != nullptr && !may_include(*room, *target))
                found.push_back(file + " includes " + *target + ": not for the eyes of " + room->directory);
            if (!target && include.starts_with("deeppcr/"))
                found.push_back(file + " includes " + include + ": no such public header");
            for (const Library& library : libraries)
                if (!target && std::regex_match(include, library.include) && !std::regex_match(file, library.allowed))
                    found.push_back(file + " includes " + include + ": " + library.name + " must not be seen here");
        }
    }
    return found;
}

/// `file` and everything it includes, directly or not: paths of the tree, and names of other libraries' headers.
std::set<std::string> closure(const Tree& tree, const std::string& file) {
    std::set<std::string> seen;
    std::vector<std::string> next = {file};
    while (!next.empty()) {
        const std::string path = next.back();
        next.pop_back();
        if (!seen.insert(path).second || !tree.contains(path)) continue;
        for (const std::string& include : includes(tree.at(path)))
            next.push_back(resolve(tree, path, include).value_or(include));
    }
    return seen;
}

Tree read_tree() {
    Tree tree;
    const fs::path root = DEEPPCR_SOURCE_TREE;
    for (const char* directory : {"include", "src", "files", "nn", "cli", "examples", "tests", "benchmarks"}) {
        if (!fs::exists(root / directory)) continue;
        for (const auto& entry : fs::recursive_directory_iterator(root / directory)) {
            const std::string extension = entry.path().extension().string();
            if (!std::set<std::string>{".hpp", ".cpp", ".cuh", ".cu"}.contains(extension)) continue;
            std::ostringstream contents;
            contents << std::ifstream(entry.path()).rdbuf();
            tree[fs::relative(entry.path(), root).generic_string()] = contents.str();
        }
    }
    return tree;
}

TEST(Structure, IncludesFollowTheArrows) {
    const Tree tree = read_tree();
    for (const Room& room : rooms)
        EXPECT_TRUE(
            std::any_of(tree.begin(), tree.end(), [&](const auto& f) { return f.first.starts_with(room.directory); }))
            << "no sources were found in " << room.directory;
    for (const std::string& violation : violations(tree)) ADD_FAILURE() << violation;
}

TEST(Structure, TheSolverNeverSeesARecurrence) {
    const Tree tree = read_tree();
    for (const auto& [file, contents] : tree)
        if (file.starts_with("src/reduce/")) {
            EXPECT_FALSE(closure(tree, file).contains(headers + "recurrence.hpp")) << file;
        }
}

TEST(Structure, TrainingCanBeUsedWithoutLibTorch) {
    const Tree tree = read_tree();
    for (const char* header : {"cell_kind.hpp", "language_model.hpp", "names.hpp", "swap.hpp", "tasks.hpp",
                               "tokens.hpp", "trained_cell.hpp", "training.hpp"}) {
        ASSERT_TRUE(tree.contains(nn_headers + header));
        for (const std::string& included : closure(tree, nn_headers + header))
            EXPECT_FALSE(std::regex_match(included, libraries.front().include)) << header << ": " << included;
    }
}

TEST(Structure, PublicHeadersDoNotDependOnBuildOptions) {
    for (const auto& [file, contents] : read_tree())
        if (file.starts_with(headers) && !file.starts_with(nn_headers)) {
            EXPECT_TRUE(contents.find("#pragma once\n") != std::string::npos) << file;
            // What a compiler is and can do is no option of the build: cell_kernels.hpp asks for target attributes.
            for (std::size_t at = contents.find("\n#if"); at != std::string::npos;
                 at = contents.find("\n#if", at + 1)) {
                const std::string_view line = std::string_view(contents).substr(at + 1);
                EXPECT_TRUE(line.starts_with("#if defined(_") || line.starts_with("#if !defined(_") ||
                            line.starts_with("#if __has_feature("))
                    << file;
            }
        }
}

TEST(Structure, TheMainHeaderIncludesEveryPublicHeader) {
    const Tree tree = read_tree();
    const auto included = closure(tree, headers + "deeppcr.hpp");
    for (const auto& [file, contents] : tree)
        if (file.starts_with(headers) && !file.starts_with(nn_headers) && !file.ends_with(".cuh")) {
            EXPECT_TRUE(included.contains(file)) << file;
        }
}

TEST(Structure, TheReadmeShowsTheExampleThatTheTestsRun) {
    std::ostringstream readme;
    readme << std::ifstream(fs::path(DEEPPCR_SOURCE_TREE) / "README.md").rdbuf();
    const std::string example = read_tree().at("examples/scalar_recurrence.cpp");
    EXPECT_NE(readme.str().find("```cpp\n" + example + "```"), std::string::npos);
}

TEST(Structure, ViolationsAreFound) {
    const Tree good = {{"include/deeppcr/array.hpp", "#include <vector>\n"},
                       {"include/deeppcr/recurrence.hpp", "#include <deeppcr/array.hpp>\n"},
                       {"include/deeppcr/nn/module.hpp", "#include <torch/torch.h>\n"},
                       {"src/device/threads.hpp", "#include <deeppcr/array.hpp>\n"},
                       {"src/reduce/solve.cpp", "#include \"device/threads.hpp\"\n#include <hwy/highway.h>\n"},
                       {"src/distribute/mpi.cpp", "#include <mpi.h>\n"},
                       {"cli/main.cpp", "#include <deeppcr/nn/module.hpp>\n"}};
    EXPECT_TRUE(violations(good).empty());
    const std::vector<std::pair<std::string, std::string>> bad = {
        {"include/deeppcr/array.hpp", "#include <hwy/highway.h>\n"},
        {"include/deeppcr/array.hpp", "#include <deeppcr/nn/module.hpp>\n"},
        {"include/deeppcr/array.hpp", "#include <deeppcr/missing.hpp>\n"},
        {"src/device/threads.hpp", "  #  include \"../reduce/solve.cpp\"\n"},
        {"src/reduce/solve.cpp", "#include <deeppcr/recurrence.hpp>\n"},
        {"src/reduce/solve.cpp", "#include <mpi.h>\n"},
        {"cli/main.cpp", "#include \"device/threads.hpp\"\n"},
        {"cli/main.cpp", "#include <ATen/ATen.h>\n"}};
    for (const auto& [file, contents] : bad) {
        Tree tree = good;
        tree[file] = contents;
        EXPECT_EQ(violations(tree).size(), 1u) << file << ": " << contents;
    }
}

}  // namespace
