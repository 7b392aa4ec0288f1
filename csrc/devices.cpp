#include "devices.h"

#include "errors.h"
#include "log_sink.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <shared_mutex>

namespace reap {

namespace {

std::shared_mutex mutex;  // of the engine's list of devices, and of known_servers
std::set<std::string> known_servers;

const char * kind_of(ggml_backend_dev_t device) {
    switch (ggml_backend_dev_type(device)) {
        case GGML_BACKEND_DEVICE_TYPE_CPU:
            return "cpu";
        case GGML_BACKEND_DEVICE_TYPE_GPU:
            return "gpu";
        case GGML_BACKEND_DEVICE_TYPE_IGPU:
            return "igpu";
        default:
            return "accel";
    }
}

// Whether a device belongs to an RPC server. Each server has a registry of its own, "RPC[host:port]".
bool is_remote(ggml_backend_dev_t device) {
    return std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device))).rfind("RPC", 0) == 0;
}

// A function of the RPC backend, by name: a backend that is loaded at run time cannot be linked.
template <typename Function>
Function rpc_function(const char * name) {
    const ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    const auto function = rpc ? reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(rpc, name)) : nullptr;
    if (function == nullptr) {
        throw UsageError("this build of the engine has no RPC backend");
    }
    return function;
}

// UsageError where it is not "host:port".
void check_endpoint(const std::string & endpoint) {
    const size_t colon = endpoint.rfind(':');
    const std::string port = colon == std::string::npos ? "" : endpoint.substr(colon + 1);
    const bool is_number = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
    if (!is_number || colon == 0 || std::stoi(port) == 0 || std::stoi(port) > 65535) {
        throw UsageError("rpc server '" + endpoint + "' is not of the form host:port");
    }
}

std::string joined(const std::vector<std::string> & words) {
    std::string text;
    for (const auto & word : words) {
        text += (text.empty() ? "" : ", ") + word;
    }
    return text;
}

std::vector<std::string> device_names() {
    std::vector<std::string> names;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        names.emplace_back(ggml_backend_dev_name(ggml_backend_dev_get(i)));
    }
    return names;
}

// The devices to use where none is named: those of the servers `endpoints`, and this machine's.
std::vector<ggml_backend_dev_t> default_devices(const std::vector<std::string> & endpoints) {
    std::vector<ggml_backend_dev_t> remote, local;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const std::string description = ggml_backend_dev_description(device);  // of a server's device: the server
        if (!is_remote(device)) {
            if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_GPU) {
                local.push_back(device);
            }
        } else if (std::find(endpoints.begin(), endpoints.end(), description) != endpoints.end()) {
            remote.push_back(device);
        }
    }
    remote.insert(remote.end(), local.begin(), local.end());
    return remote;
}

}  // namespace

std::vector<DeviceInfo> list_devices(const std::vector<std::string> & answering) {
    const DevicesLock lock = lock_devices();
    std::vector<DeviceInfo> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const std::string server = ggml_backend_dev_description(device);  // of a server's device: the server
        if (is_remote(device) && std::find(answering.begin(), answering.end(), server) == answering.end()) {
            continue;  // to ask a server that is gone would end the process
        }
        const ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
        size_t free_bytes = 0;
        size_t total_bytes = 0;
        ggml_backend_dev_memory(device, &free_bytes, &total_bytes);
        devices.push_back({ggml_backend_dev_name(device), ggml_backend_dev_description(device), kind_of(device),
                           type ? ggml_backend_buft_name(type) : "", free_bytes, total_bytes});
    }
    return devices;
}

std::vector<BackendInfo> list_backends() {
    const DevicesLock lock = lock_devices();
    std::vector<BackendInfo> backends;
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        const ggml_backend_reg_t backend = ggml_backend_reg_get(i);
        if (std::string(ggml_backend_reg_name(backend)).rfind("RPC[", 0) == 0) {
            continue;  // a server, which is not a backend of its own
        }
        Dl_info library{};  // a registry entry is a static object of its backend's library
        const bool found = dladdr(backend, &library) != 0 && library.dli_fname != nullptr;
        backends.push_back({ggml_backend_reg_name(backend), found ? library.dli_fname : "", ggml_backend_reg_dev_count(backend)});
    }
    return backends;
}

void load_backends(const std::string & folder) {
#ifdef GGML_BACKEND_DL
    static bool loaded = false;
    const std::unique_lock<std::shared_mutex> lock(mutex);
    if (!loaded) {
        ggml_backend_load_all_from_path(folder.c_str());
        loaded = true;
    }
    if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
        throw EngineError(folder + ": none of the CPU backends there (libggml-cpu-*) runs on this processor; install reap again");
    }
#else
    static_cast<void>(folder);
#endif
}

DevicesLock lock_devices() {
    return DevicesLock(mutex);
}

void add_rpc_servers(const std::vector<std::string> & endpoints) {
    if (endpoints.empty()) {
        return;
    }
    const std::unique_lock<std::shared_mutex> lock(mutex);
    for (const auto & endpoint : endpoints) {
        if (known_servers.count(endpoint) != 0) {
            continue;
        }
        check_endpoint(endpoint);
        const auto add = rpc_function<ggml_backend_reg_t (*)(const char *)>("ggml_backend_rpc_add_server");
        const ggml_backend_reg_t server = add(endpoint.c_str());
        if (server == nullptr) {
            throw EngineError(with_log("no device at the RPC server " + endpoint));
        }
        ggml_backend_register(server);
        known_servers.insert(endpoint);
    }
}

std::vector<std::string> rpc_servers() {
    const DevicesLock lock = lock_devices();
    return {known_servers.begin(), known_servers.end()};
}

DeviceChoice choose_devices(const DevicesLock &, const std::vector<std::string> & names, const std::vector<std::string> & endpoints) {
    if (names.empty()) {
        return {!known_servers.empty(), default_devices(endpoints)};
    }
    std::vector<ggml_backend_dev_t> devices;
    for (const auto & name : names) {
        if (name == "none") {
            continue;  // llama.cpp's word for "the CPU alone"
        }
        const ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
        if (device == nullptr) {
            throw UsageError("there is no device '" + name + "'; there is " + joined(device_names()));
        }
        if (std::find(devices.begin(), devices.end(), device) == devices.end()) {
            devices.push_back(device);
        }
    }
    return {true, devices};
}

ggml_backend_buffer_type_t find_buffer_type(const DevicesLock &, const std::string & name) {
    std::vector<std::string> known;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(ggml_backend_dev_get(i));
        if (type == nullptr) {
            continue;
        }
        if (name == ggml_backend_buft_name(type)) {
            return type;
        }
        known.emplace_back(ggml_backend_buft_name(type));
    }
    throw UsageError("there is no buffer type '" + name + "' to put tensors in; there is " + joined(known));
}

void serve_rpc(const std::string & endpoint, int n_threads) {
    using Serve = void (*)(const char *, const char *, size_t, size_t, ggml_backend_dev_t *);
    const auto serve = rpc_function<Serve>("ggml_backend_rpc_start_server");
    std::vector<ggml_backend_dev_t> devices;
    {
        const DevicesLock lock = lock_devices();
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            const ggml_backend_dev_t device = ggml_backend_dev_get(i);
            if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
                devices.push_back(device);
            }
        }
        if (devices.empty()) {
            devices.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
        }
    }
    serve(endpoint.c_str(), nullptr, static_cast<size_t>(n_threads), devices.size(), devices.data());
}

}  // namespace reap
