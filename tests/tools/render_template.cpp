// Renders conversations with llama.cpp's own engine for chat templates, along the path that its server takes: the tests' second opinion.
// Reads JSON Lines from standard input, each {"template", "bos", "eos", "messages", "tools", "kwargs", "add_generation_prompt"}; writes a
// line for each: {"text"} or {"error"}, and {"caps"}, what the engine believes that the template can take.

#include "chat.h"
#include "json.h"
#include "log.h"

#include <exception>
#include <iostream>
#include <map>
#include <string>

namespace {

using Templates = std::map<std::string, common_chat_templates_ptr>;

const common_chat_templates * compiled(Templates & cache, const common_json & request) {
    const auto source = request.at("template").get<std::string>();
    const auto bos = request.value("bos", std::string());
    const auto eos = request.value("eos", std::string());
    auto & found = cache[source + '\0' + bos + '\0' + eos];
    if (!found) {
        found = common_chat_templates_init(nullptr, source, bos, eos);
    }
    return found.get();
}

common_json render(Templates & cache, const common_json & request) {
    const auto * templates = compiled(cache, request);
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    if (request.contains("tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    if (request.contains("kwargs")) {
        for (const auto & [name, value] : request.at("kwargs").items()) {
            inputs.chat_template_kwargs[name] = value.dump();
        }
    }
    inputs.add_generation_prompt = request.value("add_generation_prompt", false);
    common_json answer = common_json::object();
    common_json caps = common_json::object();
    for (const auto & [name, value] : common_chat_templates_get_caps(templates)) {
        caps[name] = value;
    }
    answer["caps"] = caps;
    try {
        answer["text"] = common_chat_templates_apply(templates, inputs).prompt;
    } catch (const std::exception & error) {
        answer["error"] = std::string(error.what());
    }
    return answer;
}

}  // namespace

int main() {
    common_log_pause(common_log_main());
    Templates cache;
    for (std::string line; std::getline(std::cin, line);) {
        common_json answer = common_json::object();
        try {
            answer = render(cache, common_json::parse(line));
        } catch (const std::exception & error) {
            answer["error"] = std::string(error.what());
        }
        std::cout << answer.dump() << std::endl;
    }
}
