// Turns the pictures of structures into views that can be turned. Without WebGL or scripts the pictures stay.
"use strict";

const { structures, colours, largest } = JSON.parse(document.getElementById("structures").textContent);
let library;

// Plotly lies packed in this page and is unpacked when the first structure is looked at.
function plotly() {
  library ??= (async () => {
    const packed = atob(document.getElementById("plotly").textContent.trim());
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    return window.Plotly;
  })();
  return library;
}

// Corners and faces of a ball of radius 1: an icosahedron, its faces quartered.
function ball(times) {
  const t = (1 + Math.sqrt(5)) / 2;
  const unit = (p) => p.map((c) => c / Math.hypot(...p));
  const corners = [[-1, t, 0], [1, t, 0], [-1, -t, 0], [1, -t, 0], [0, -1, t], [0, 1, t], [0, -1, -t], [0, 1, -t],
    [t, 0, -1], [t, 0, 1], [-t, 0, -1], [-t, 0, 1]].map(unit);
  let faces = [[0, 11, 5], [0, 5, 1], [0, 1, 7], [0, 7, 10], [0, 10, 11], [1, 5, 9], [5, 11, 4], [11, 10, 2], [10, 7, 6],
    [7, 1, 8], [3, 9, 4], [3, 4, 2], [3, 2, 6], [3, 6, 8], [3, 8, 9], [4, 9, 5], [2, 4, 11], [6, 2, 10], [8, 6, 7], [9, 8, 1]];
  for (let time = 0; time < times; time++) {
    const middles = new Map();
    const middle = (a, b) => {
      const key = a < b ? `${a},${b}` : `${b},${a}`;
      if (!middles.has(key)) middles.set(key, corners.push(unit(corners[a].map((c, i) => c + corners[b][i]))) - 1);
      return middles.get(key);
    };
    faces = faces.flatMap(([a, b, c]) => {
      const [ab, bc, ca] = [middle(a, b), middle(b, c), middle(c, a)];
      return [[a, ab, ca], [b, bc, ab], [c, ca, bc], [ab, bc, ca]];
    });
  }
  return [corners, faces];
}

function mesh() {
  return { type: "mesh3d", x: [], y: [], z: [], i: [], j: [], k: [], hoverinfo: "skip", flatshading: false,
    lighting: { ambient: 0.6, diffuse: 0.55, specular: 0.2, roughness: 0.45, fresnel: 0, facenormalsepsilon: 0, vertexnormalsepsilon: 0 },
    // From over the viewer's left shoulder, who looks along z.
    lightposition: { x: -40000, y: 70000, z: -80000 } };
}

function add(mesh, corners, faces) {
  const first = mesh.x.length;
  for (const [x, y, z] of corners) { mesh.x.push(x); mesh.y.push(y); mesh.z.push(z); }
  for (const [a, b, c] of faces) { mesh.i.push(first + a); mesh.j.push(first + b); mesh.k.push(first + c); }
}

function atomsOf({ positions, radii, uncertainties, names }) {
  const [corners, faces] = ball(positions.length > 150 ? 1 : positions.length > 40 ? 2 : 3);
  const atoms = { ...mesh(), intensity: [], text: [], hoverinfo: "text", cmin: 0, cmax: largest, colorscale: colours, showscale: false };
  positions.forEach((centre, n) => {
    add(atoms, corners.map((corner) => corner.map((c, i) => centre[i] + radii[n] * c)), faces);
    // What is not a number cannot be coloured by one: it is the worst there is.
    for (const _ of corners) { atoms.intensity.push(uncertainties[n] ?? largest); atoms.text.push(names[n]); }
  });
  return atoms;
}

function sticksOf({ positions, bonds }) {
  const sticks = { ...mesh(), color: "#9aa3aa" };
  const sides = 8, radius = 0.09;
  for (const [a, b] of bonds) {
    const [start, end] = [positions[a], positions[b]];
    const along = end.map((c, i) => c - start[i]);
    const length = Math.hypot(...along);
    const cross = (u, v) => [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
    let u = cross(along, Math.abs(along[0]) < 0.8 * length ? [1, 0, 0] : [0, 1, 0]);
    u = u.map((c) => c / Math.hypot(...u));
    const v = cross(along, u).map((c) => c / length);
    const corners = [], faces = [];
    for (let side = 0; side < sides; side++) {
      const angle = (2 * Math.PI * side) / sides;
      const out = u.map((c, i) => radius * (Math.cos(angle) * c + Math.sin(angle) * v[i]));
      corners.push(start.map((c, i) => c + out[i]), end.map((c, i) => c + out[i]));
      const [p, q] = [2 * side, 2 * ((side + 1) % sides)];
      faces.push([p, q, p + 1], [p + 1, q, q + 1]);
    }
    add(sticks, corners, faces);
  }
  return sticks;
}

function cellOf({ cell }) {
  const lines = { type: "scatter3d", mode: "lines", x: [], y: [], z: [], hoverinfo: "skip", line: { color: "#8c8c8c", width: 2 } };
  for (const [start, end] of cell) {
    for (const [x, y, z] of [start, end, [null, null, null]]) { lines.x.push(x); lines.y.push(y); lines.z.push(z); }
  }
  return lines;
}

async function turn(figure) {
  if (figure.dataset.turning) return;
  figure.dataset.turning = "yes";
  const structure = structures[Number(figure.dataset.structure)];
  const view = figure.querySelector(".view");
  const picture = view.querySelector("img");
  const place = document.createElement("div");
  try {
    const drawn = await plotly();
    view.append(place);
    const axis = { visible: false, showspikes: false };
    await drawn.newPlot(
      place,
      [atomsOf(structure), sticksOf(structure), cellOf(structure)].filter((trace) => trace.x.length),
      {
        margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: "rgba(0,0,0,0)", showlegend: false,
        scene: {
          xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "data", bgcolor: "rgba(0,0,0,0)", dragmode: "orbit",
          camera: { projection: { type: "orthographic" }, eye: { x: 0, y: 0, z: 1.6 }, up: { x: 0, y: 1, z: 0 } },
        },
      },
      { displayModeBar: false, responsive: true },
    );
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", picture.alt);
    picture.hidden = true;
    figure.querySelector("button").hidden = true;
    figure.dataset.turning = "done";
  } catch (error) {
    place.remove();
    console.error(error);
  }
}

if (window.DecompressionStream && document.createElement("canvas").getContext("webgl")) {
  // A finger that scrolls the page must not get caught in a structure: there, a button asks for it.
  const byMouse = matchMedia("(hover: hover) and (pointer: fine)").matches;
  const seen = new IntersectionObserver((entries) => entries.forEach((e) => e.isIntersecting && turn(e.target)), { rootMargin: "300px" });
  for (const figure of document.querySelectorAll("figure[data-structure]")) {
    const button = figure.querySelector("button");
    button.hidden = false;
    button.addEventListener("click", () => turn(figure));
    if (byMouse) seen.observe(figure);
  }
}
