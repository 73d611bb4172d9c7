"use strict";
// Light or dark: the system's choice until the button is pressed. What follows the theme listens to `themechange`.
const dark = matchMedia("(prefers-color-scheme: dark)");
const told = () => document.dispatchEvent(new Event("themechange"));
dark.addEventListener("change", told);
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme || (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  told();
});

// Text that was compressed into a script element of the page.
async function unpacked(id) {
  if (!("DecompressionStream" in window)) throw new Error("this browser cannot unpack them (it has no DecompressionStream)");
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function trouble(what, error) {
  const place = document.getElementById("trouble");
  place.textContent += `${what} cannot be shown: ${error.message}. `;
  place.hidden = false;
  console.error(error);
}
