"use strict";

const root = document.documentElement;

// A page opened from a file may have no storage.
function remembered() {
  try { return localStorage.getItem("kdbench-theme"); } catch { return null; }
}

function remember(theme) {
  try { localStorage.setItem("kdbench-theme", theme); } catch { return; }
}

if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();

function themeButton() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
}

function compare(a, b, words) {
  return words ? a.localeCompare(b) : Number(a) - Number(b);
}

function sortBy(table, index) {
  const headings = [...table.tHead.rows[0].cells];
  const words = headings[index].classList.contains("words");
  const first = words ? "ascending" : "descending";
  const second = words ? "descending" : "ascending";
  const order = headings[index].getAttribute("aria-sort") === first ? second : first;
  for (const heading of headings) heading.removeAttribute("aria-sort");
  headings[index].setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((left, right) => {
    const a = left.cells[index].dataset.value;
    const b = right.cells[index].dataset.value;
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return sign * compare(a, b, words);
  });
  table.tBodies[0].append(...rows);
}

function filterBy(board, text) {
  const wanted = text.trim().toLowerCase();
  const all = [...board.querySelectorAll("[data-method]")];
  for (const item of all) item.hidden = !item.dataset.method.toLowerCase().includes(wanted);
  const rows = all.filter((item) => item.tagName === "TR");
  const shown = rows.filter((item) => !item.hidden).length;
  board.querySelector(".filter span").textContent = wanted ? `${shown} of ${rows.length}` : "";
}

document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("th button").forEach((button, index) => {
      button.disabled = false;
      button.addEventListener("click", () => sortBy(table, index));
    });
  }
  for (const board of document.querySelectorAll(".board")) {
    const box = board.querySelector(".filter");
    box.hidden = false;
    box.querySelector("input").addEventListener("input", (event) => filterBy(board, event.target.value));
  }
});
