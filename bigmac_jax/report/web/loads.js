// Expert load over time: a heat map a layer, of one run at a time.

const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const RAMP = VIRIDIS.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
const loads = document.getElementById("loads");
const withLoad = RUNS.filter((run) => run.load);

function colour(share) {
  const place = Math.min(1, share) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(place));
  return RAMP[i].map((c, j) => c + (RAMP[i + 1][j] - c) * (place - i));
}

function drawLoads() {
  if (!withLoad.length) return;
  const run = withLoad[Number(loads.querySelector("select").value)], { layers, experts, step, max } = run.load;
  const columns = step.length;
  const load = Float32Array.from(atob(run.load.cells), (c) => max * (c.charCodeAt(0) / 255) ** 2);
  const top = Math.min(4, Math.max(2, Math.ceil(load.toSorted()[Math.floor(0.99 * load.length)])));
  const readout = loads.querySelector(".readout");
  loads.querySelector("#top").textContent = top < max ? `${digits(top, 2)} and more` : digits(top, 2);
  const label = (column) => `${view.axis === "step" ? "step" : view.axis} ${shown(position(run, step[column]), "")}`;
  const maps = Array.from({ length: layers }, (_, layer) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = experts;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Layer ${layer}: load of ${experts} experts from ${label(0)} to ${label(columns - 1)}`);
    const image = new ImageData(columns, experts), offset = layer * experts * columns;
    for (let i = 0; i < experts * columns; i++) image.data.set([...colour(load[offset + i] / top), 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.onpointermove = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
      const expert = Math.min(experts - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * experts)));
      readout.innerHTML = `layer ${layer}, expert ${expert}, ${label(column)}: <b>${digits(load[offset + expert * columns + column], 3)}</b> × the mean`;
    };
    figure.innerHTML = `<figcaption>Layer ${layer} <small>experts 0 to ${experts - 1}, downwards</small></figcaption>`;
    figure.append(canvas);
    figure.insertAdjacentHTML("beforeend", `<p><span>${label(0)}</span><span>${label(columns - 1)}</span></p>`);
    return figure;
  });
  loads.querySelector(".maps").replaceChildren(...maps);
}

loads.hidden = !withLoad.length;
loads.querySelector("select").innerHTML = withLoad.map((run, i) => `<option value="${i}">${run.letter} ${escaped(run.name)}</option>`).join("");
loads.querySelector("select").onchange = drawLoads;
loads.querySelector(".ramp").style.background = `linear-gradient(to right, ${VIRIDIS.join(", ")})`;

drawAll();
drawLoads();

let drawnWidth = document.body.clientWidth;
new ResizeObserver(() => {
  if (document.body.clientWidth !== drawnWidth) { drawnWidth = document.body.clientWidth; drawAll(); }
}).observe(document.body);
