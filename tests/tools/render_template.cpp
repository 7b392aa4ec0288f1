// Renders conversations with llama.cpp's own engine for chat templates, along the path that its server takes: the tests' second opinion.
// Reads JSON Lines from standard input, each {"template", "bos", "eos", "messages", "tools", "kwargs", "add_generation_prompt"}; writes a
// line for each: {"text"} or {"error"}, and {"caps"}, what the engine believes that the template can take.

#include "chat-auto-parser.h"
#include "chat.h"
#include "json.h"
#include "log.h"

#include <exception>
#include <iostream>
#include <map>
#include <string>
#include <utility>

namespace {

struct Compiled {
    common_chat_templates_ptr templates;
    bool is_special = false;
};

using Templates = std::map<std::string, Compiled>;

// Whether the engine has code of its own for this template, which may change the messages. For any other it would study the template
// for each prompt, to parse answers: slow, and without a bearing on the prompt.
bool is_special(const std::string & source) {
    autoparser::generation_params params;
    params.messages = common_json::array({common_json{{"role", "user"}, {"content", "question"}}});
    params.tools = common_json::array();
    try {
        return common_chat_try_specialized_template(common_chat_template(source, "", ""), source, params).has_value();
    } catch (const std::exception &) {
        return true;
    }
}

const Compiled & compiled(Templates & cache, const common_json & request) {
    const auto source = request.at("template").get<std::string>();
    const auto bos = request.value("bos", std::string());
    const auto eos = request.value("eos", std::string());
    auto & found = cache[source + '\0' + bos + '\0' + eos];
    if (!found.templates) {
        found = {common_chat_templates_init(nullptr, source, bos, eos), is_special(source)};
    }
    return found;
}

common_json render(Templates & cache, const common_json & request) {
    const auto & [templates_of, is_special] = compiled(cache, request);
    const auto * templates = templates_of.get();
    common_chat_templates_inputs inputs;
    inputs.force_pure_content = !is_special;
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
