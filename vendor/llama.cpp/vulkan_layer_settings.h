// What llama.cpp's Vulkan backend uses of VK_EXT_layer_settings (it asks for a check of the validation layers with it), for Vulkan
// headers that are older than the extension: Debian 12 has 1.3.239, the extension came with 1.3.272. Included ahead of the backend's
// sources by llama.cpp.cmake where the headers are that old; the layout is that of the Vulkan specification.
#pragma once

#if defined(__cplusplus)

#include <vulkan/vulkan_core.h> // not the C++ header: the backend sets macros ahead of that

#include <vector>

#if VK_HEADER_VERSION < 272

namespace vk {

enum class LayerSettingTypeEXT : int32_t { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        pLayerName;
    const char *        pSettingName;
    LayerSettingTypeEXT type;
    uint32_t            valueCount;
    const void *        pValues;
};

struct LayerSettingsCreateInfoEXT {
    VkStructureType         sType = static_cast<VkStructureType>(1000496000);
    const void *            pNext = nullptr;
    uint32_t                settingCount;
    const LayerSettingEXT * pSettings;

    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}
};

}  // namespace vk

#endif
#endif
