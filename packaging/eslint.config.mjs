// What .ci/run lints the script of the report with; it runs beside the packages that it imports.
import js from "@eslint/js";

const PAGE_GLOBALS = [
  "Plotly", "document", "matchMedia", "getComputedStyle", "addEventListener", "setTimeout", "atob", "Option", "Intl",
];

export default [
  js.configs.recommended,
  {
    files: ["**/*.js"],
    languageOptions: {
      ecmaVersion: 2022,
      sourceType: "script",
      globals: Object.fromEntries(PAGE_GLOBALS.map((name) => [name, "readonly"])),
    },
    rules: {
      "max-lines-per-function": ["error", 40],
      "max-len": ["error", { code: 120, ignoreTemplateLiterals: true }],
      "prefer-const": "error",
      eqeqeq: "error",
    },
  },
];
