#include "devices.h"

#include "errors.h"
#include "log_sink.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <set>

namespace reap {

namespace {

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

}  // namespace

std::vector<DeviceInfo> list_devices(const std::vector<std::string> & answering) {
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
    std::vector<BackendInfo> backends;
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        const ggml_backend_reg_t backend = ggml_backend_reg_get(i);
        if (std::string(ggml_backend_reg_name(backend)).rfind("RPC[", 0) == 0) {
            continue;  // a server, which is no backend of its own
        }
        Dl_info library{};  // a registry entry is a static object of its backend's library
        const bool found = dladdr(backend, &library) != 0 && library.dli_fname != nullptr;
        backends.push_back({ggml_backend_reg_name(backend), found ? library.dli_fname : "", ggml_backend_reg_dev_count(backend)});
    }
    return backends;
}

void load_backends(const std::string & folder) {
#ifdef GGML_BACKEND_DL
    static std::once_flag once;
    std::call_once(once, [&folder] { ggml_backend_load_all_from_path(folder.c_str()); });
    if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
        throw EngineError(folder + ": none of the CPU backends there (libggml-cpu-*) runs on this processor; install reap again");
    }
#else
    static_cast<void>(folder);
#endif
}

void add_rpc_servers(const std::vector<std::string> & endpoints) {
    for (const auto & endpoint : endpoints) {
        if (known_servers.count(endpoint) != 0) {
            continue;
        }
        const auto add = rpc_function<ggml_backend_reg_t (*)(const char *)>("ggml_backend_rpc_add_server");
        const ggml_backend_reg_t server = add(endpoint.c_str());
        if (server == nullptr) {
            const std::string tail = log_tail();
            throw EngineError("no device at the RPC server " + endpoint + (tail.empty() ? "" : ": " + tail));
        }
        ggml_backend_register(server);
        known_servers.insert(endpoint);
    }
}

bool rpc_servers_known() { return !known_servers.empty(); }

std::vector<std::string> rpc_servers() { return {known_servers.begin(), known_servers.end()}; }

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

void serve_rpc(const std::string & endpoint, int n_threads) {
    using Serve = void (*)(const char *, const char *, size_t, size_t, ggml_backend_dev_t *);
    const auto serve = rpc_function<Serve>("ggml_backend_rpc_start_server");
    std::vector<ggml_backend_dev_t> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            devices.push_back(device);
        }
    }
    if (devices.empty()) {
        devices.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    }
    serve(endpoint.c_str(), nullptr, static_cast<size_t>(n_threads), devices.size(), devices.data());
}

}  // namespace reap
