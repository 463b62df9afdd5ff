// The race as it runs: hit ratios over time, by uPlot. Colours are those of the style sheet, dark or light.

import uPlot from "./uplot.js";
import { $, percent } from "./elements.js";

const POINTS_MAX = 900;  // a quarter of an hour, a status each second
const HEIGHT_PX = 150;
const RUNNERS = [
  { name: "model", words: "model", colour: "--accent", width: 2.5 },
  { name: "popularity", words: "popularity", colour: "--popular", width: 2, dash: [7, 4] },
  { name: "item_knn", words: "item-kNN", colour: "--knn", width: 2, dash: [2, 3] },
];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const axis = {
  stroke: () => colour("--soft"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false },
  font: "12px system-ui, sans-serif",
};
const data = [[], ...RUNNERS.map(() => [])];
let plot;

function draw() {
  const box = $("race");
  plot = new uPlot({
    width: box.clientWidth, height: HEIGHT_PX, legend: { show: false }, cursor: { show: false },
    padding: [8, 28, 0, 0],
    scales: { y: { range: (_, low, high) => [0, Math.max(high, 0.01) * 1.1] } },
    axes: [
      { ...axis, space: 70, size: 26, values: (_, times) => times.map((at) => new Date(at * 1000).toLocaleTimeString("en-GB")) },
      { ...axis, space: 30, size: 46, values: (_, shares) => shares.map((share) => `${+(100 * share).toFixed(1)} %`) },
    ],
    series: [{}, ...RUNNERS.map(({ colour: name, width, dash }) => ({ stroke: () => colour(name), width, dash, points: { show: false } }))],
  }, data, box);
  new ResizeObserver(() => plot.setSize({ width: box.clientWidth, height: HEIGHT_PX })).observe(box);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot.redraw());
}

// ratios: name -> share of hits, null before the first ranked target.
export function showRace(ratios) {
  for (const { name } of RUNNERS) $(`race-${name}`).textContent = percent(ratios[name]);
  if (ratios.model === null || ratios.model === undefined) return;
  data[0].push(Date.now() / 1000);
  RUNNERS.forEach(({ name }, place) => data[place + 1].push(ratios[name] ?? null));
  if (data[0].length > POINTS_MAX) data.forEach((column) => column.shift());
  if (plot) plot.setData(data);
  else draw();
  $("race").setAttribute("aria-label", `Hit ratio now: ${RUNNERS.map(({ name, words }) => `${words} ${percent(ratios[name])}`).join(", ")}`);
}
