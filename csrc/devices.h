// The devices that the engine can use here, and the server that lends them to others.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <string>
#include <vector>

namespace reap {

struct DeviceInfo {
    std::string name;         // as --device takes it
    std::string description;
    std::string kind;         // "cpu", "gpu", "igpu", "accel"
    std::string buffer_type;  // as --override-tensor takes it
    uint64_t    free_bytes;
    uint64_t    total_bytes;
};

// Those of this machine, and of the RPC servers in `answering`.
std::vector<DeviceInfo> list_devices(const std::vector<std::string> & answering);

struct BackendInfo {
    std::string name;     // "CPU", "CUDA", "RPC", ...
    std::string library;  // the file that it was loaded from
    size_t      n_devices;
};

std::vector<BackendInfo> list_backends();

// Loads the backends that are modules of their own (GGML_BACKEND_DL) from a folder: of the CPU's variants the best that runs here, of
// the others what can be loaded. Does nothing where backends are linked.
void load_backends(const std::string & folder);

// Adds the devices of RPC servers ("host:port") to those of this process, once each.
void add_rpc_servers(const std::vector<std::string> & endpoints);

// The servers that sessions of this process have added, and whether there are any.
std::vector<std::string> rpc_servers();
bool rpc_servers_known();

// The devices to use where nobody names any: this machine's, and those of the servers named. Servers that an earlier session added stay
// known to the engine, which would take them as well.
std::vector<ggml_backend_dev_t> default_devices(const std::vector<std::string> & endpoints);

// Serves this machine's devices over llama.cpp's RPC protocol until the process ends. The protocol trusts whoever connects.
void serve_rpc(const std::string & endpoint, int n_threads);

}  // namespace reap
