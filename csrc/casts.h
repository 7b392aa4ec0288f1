// Between Python's objects and the core's: part of bindings.cpp, and included by nothing else.
#pragma once

#include "errors.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// What the engine or a file says is bytes: what is not UTF-8 in it is shown as U+FFFD.
inline py::str to_text(const std::string & bytes) {
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "replace"));
}

inline py::list to_texts(const std::vector<std::string> & lines) {
    py::list texts;
    for (const std::string & line : lines) {
        texts.append(to_text(line));
    }
    return texts;
}

// A path as the file system has it, from what os.fspath takes: str (with surrogates for what is not UTF-8), bytes, PathLike.
inline std::string to_path(const py::object & path) {
    PyObject * bytes = nullptr;
    if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) {
        if (PyErr_ExceptionMatches(PyExc_ValueError) != 0) {
            PyErr_Clear();
            throw reap::UsageError("a path has a zero byte in it");
        }
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::bytes>(bytes);
}

inline py::str from_path(const std::string & path) {
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<py::ssize_t>(path.size())));
}

inline std::vector<std::string> to_paths(const py::iterable & paths) {
    std::vector<std::string> result;
    for (const py::handle path : paths) {
        result.push_back(to_path(py::reinterpret_borrow<py::object>(path)));
    }
    return result;
}

inline py::list from_paths(const std::vector<std::string> & paths) {
    py::list result;
    for (const std::string & path : paths) {
        result.append(from_path(path));
    }
    return result;
}

template <typename Options, typename Class>
void def_path(Class & options, const char * name, std::string Options::* path) {
    options.def_property(
        name, [path](const Options & self) { return from_path(self.*path); },
        [path](Options & self, const py::object & value) { self.*path = to_path(value); });
}

template <typename T>
py::array_t<T> to_numpy(const std::vector<T> & values, const std::vector<py::ssize_t> & shape) {
    py::array_t<T> array(shape);
    std::copy(values.begin(), values.end(), array.mutable_data());
    return array;
}

template <typename T>
void from_numpy(const py::dict & arrays, const char * name, std::vector<T> & values) {
    const auto array = py::cast<py::array_t<T, py::array::c_style | py::array::forcecast>>(arrays[name]);
    values.assign(array.data(), array.data() + array.size());
}

inline std::vector<int32_t> to_vector(const Ids & ids) {
    return {ids.data(), ids.data() + ids.size()};
}
