// Fields: numbers on a square grid of a plane, as a heat map with contours, and as a surface.
// A field is { low, high, rows }; its rows hold whole numbers from 0 (low) to LEVELS (high), or null. A plane is
// { x: [low, high], y: [low, high] }, the coordinates of the first and the last column and row.

const LEVELS = 1e6;
const NUM_CONTOURS = 16;

// ---- values ----

function energyOf(field, value) {
  return value === null ? null : field.low + ((field.high - field.low) * value) / LEVELS;
}

// Values at equal shares of a field's points, so that a flat valley has as many contours as a steep wall.
function quantiles(field, count) {
  const sorted = field.rows.flat().filter((value) => value !== null).sort((a, b) => a - b);
  const levels = [];
  for (let k = 0; k <= count; k += 1) levels.push(sorted[Math.round((k / count) * (sorted.length - 1))]);
  return levels;
}

// The share of points that are lower than a value, interpolated between quantiles.
function rankOf(levels, value) {
  const last = levels.length - 1;
  let k = 0;
  while (k < last - 1 && value > levels[k + 1]) k += 1;
  const width = levels[k + 1] - levels[k];
  return (k + (width > 0 ? Math.min(Math.max((value - levels[k]) / width, 0), 1) : 0)) / last;
}

function lowestPoint(field, plane) {
  let best = [Infinity, 0, 0];
  field.rows.forEach((row, j) => row.forEach((value, i) => {
    if (value !== null && value < best[0]) best = [value, i, j];
  }));
  const last = field.rows.length - 1;
  return [1, 2].map((k) => mix(k === 1 ? plane.x : plane.y, best[k] / last));
}

function mix([low, high], share) {
  return low + (high - low) * share;
}

// The value of a field at a point of the plane, interpolated; null outside.
function valueAt(field, plane, [x, y]) {
  const last = field.rows.length - 1;
  const column = ((x - plane.x[0]) / (plane.x[1] - plane.x[0])) * last;
  const row = ((y - plane.y[0]) / (plane.y[1] - plane.y[0])) * last;
  if (!(column >= 0 && column <= last && row >= 0 && row <= last)) return null;
  const [i, j] = [Math.min(Math.floor(column), last - 1), Math.min(Math.floor(row), last - 1)];
  const corners = [field.rows[j][i], field.rows[j][i + 1], field.rows[j + 1][i], field.rows[j + 1][i + 1]];
  if (corners.includes(null)) return null;
  const [lower, upper] = [mix(corners.slice(0, 2), column - i), mix(corners.slice(2), column - i)];
  return mix([lower, upper], row - j);
}

// ---- heat map and contours ----

function heatImage(field, levels) {
  const size = field.rows.length;
  const canvas = element("canvas", { width: size, height: size });
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  field.rows.forEach((row, j) => row.forEach((value, i) => {
    const at = 4 * ((size - 1 - j) * size + i);
    const color = value === null ? [128, 128, 128] : mixColors(CIVIDIS, rankOf(levels, value));
    image.data.set([...color, 255], at);
  }));
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function contourPath(field, levels) {
  const inner = [...new Set(levels.slice(1, -1))];
  return inner.flatMap((level) => contourSegments(field.rows, level)).map(
    ([x1, y1, x2, y2]) => `M${x1.toFixed(2)} ${y1.toFixed(2)}L${x2.toFixed(2)} ${y2.toFixed(2)}`).join("");
}

// The contour of a field at a level, by marching squares: segments [x1, y1, x2, y2] in units of columns and rows.
// Squares with a corner that is null are left out.
function contourSegments(rows, level) {
  const segments = [];
  for (let j = 0; j + 1 < rows.length; j += 1) {
    for (let i = 0; i + 1 < rows[j].length; i += 1) {
      const corners = [rows[j][i], rows[j][i + 1], rows[j + 1][i + 1], rows[j + 1][i]];
      if (corners.includes(null)) continue;
      const points = squareCrossings(corners, level).map(([x, y]) => [i + x, j + y]);
      for (let k = 0; k + 1 < points.length; k += 2) segments.push([...points[k], ...points[k + 1]]);
    }
  }
  return segments;
}

// Where a level crosses the sides of a unit square, whose corners run counterclockwise from (0, 0). Of four crossings
// those next to each other are joined so that the middle, the mean of the corners, is on the right side.
function squareCrossings(corners, level) {
  const places = [[0, 0], [1, 0], [1, 1], [0, 1]];
  const crossings = [];
  for (let side = 0; side < 4; side += 1) {
    const [a, b] = [corners[side], corners[(side + 1) % 4]];
    if (a < level === b < level) continue;
    const share = (level - a) / (b - a);
    const [from, to] = [places[side], places[(side + 1) % 4]];
    crossings.push([from[0] + share * (to[0] - from[0]), from[1] + share * (to[1] - from[1])]);
  }
  const mean = (corners[0] + corners[1] + corners[2] + corners[3]) / 4;
  if (crossings.length === 4 && mean < level !== corners[0] < level) crossings.push(crossings.shift());
  return crossings;
}

function colorBar(field, levels) {
  const stops = CIVIDIS.map((color, k) => `${color} ${((100 * k) / (CIVIDIS.length - 1)).toFixed(0)}%`);
  const ticks = [0, 5, 11, 16].map((k) => element("span", {}, formatNumber(energyOf(field, levels[k]), 4)));
  return element("div", { class: "ebt-colorbar" },
    element("i", { style: `background: linear-gradient(90deg, ${stops.join(", ")})` }), element("div", {}, ...ticks));
}

// ---- the surface ----

const SURFACE = { width: 312, height: 260, tilt: 0.55, spread: 106, rise: 140, cells: 40 };

// Corners of the mesh: columns and rows from -1 to 1, height from 0 to 1, and their place on the page.
function surfaceMesh(field, angle) {
  const size = field.rows.length;
  const every = Math.max(1, Math.ceil((size - 1) / SURFACE.cells));
  const indices = [];
  for (let k = 0; k < size; k += every) indices.push(k);
  return indices.map((j) => indices.map((i) => {
    const value = field.rows[j][i];
    const position = [(2 * i) / (size - 1) - 1, (2 * j) / (size - 1) - 1, value === null ? null : value / LEVELS];
    return { value, position, place: value === null ? null : project(position, angle) };
  }));
}

// Turn by an angle about the vertical axis, tilt towards the reader: x, y on the page and the depth.
function project([x, y, z], angle) {
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  const across = x * cos - y * sin;
  const away = x * sin + y * cos;
  const [tiltCos, tiltSin] = [Math.cos(SURFACE.tilt), Math.sin(SURFACE.tilt)];
  const height = SURFACE.spread * away * tiltSin + SURFACE.rise * z * tiltCos;
  return [SURFACE.width / 2 + SURFACE.spread * across, SURFACE.height - height, away];
}

// Draw a field as a shaded surface, seen from an angle, with lines on it: [{ points, color, chosen }], the last on top.
function drawSurface(canvas, field, plane, lines, angle) {
  const ratio = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [SURFACE.width * ratio, SURFACE.height * ratio];
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const levels = quantiles(field, NUM_CONTOURS);
  const mesh = surfaceMesh(field, angle);
  const [top, bottom] = extent(mesh.flat().map((corner) => (corner.place ? corner.place[1] : null)));
  context.translate(0, (SURFACE.height - top - bottom) / 2);
  for (const corners of sortedFaces(mesh)) drawFace(context, corners, levels);
  for (const line of lines) drawSurfaceLine(context, field, plane, line, angle);
}

// The squares of a mesh, the farthest first.
function sortedFaces(mesh) {
  const faces = [];
  for (let j = 0; j + 1 < mesh.length; j += 1) {
    for (let i = 0; i + 1 < mesh.length; i += 1) {
      const corners = [mesh[j][i], mesh[j][i + 1], mesh[j + 1][i + 1], mesh[j + 1][i]];
      if (corners.every((corner) => corner.place)) faces.push(corners);
    }
  }
  const depth = (corners) => corners[0].place[2] + corners[2].place[2];
  return faces.sort((a, b) => depth(b) - depth(a));
}

function drawFace(context, corners, levels) {
  const [a, b, c, d] = corners.map((corner) => corner.position);
  const slopeX = (b[2] + c[2] - a[2] - d[2]) / (b[0] - a[0]);
  const slopeY = (c[2] + d[2] - a[2] - b[2]) / (d[1] - a[1]);
  const light = (0.35 * slopeX - 0.45 * slopeY + 1.6) / Math.hypot(slopeX, slopeY, 2) / 0.92;
  const mean = corners.reduce((sum, corner) => sum + corner.value, 0) / 4;
  const color = mixColors(CIVIDIS, rankOf(levels, mean)).map((value) =>
    Math.round(Math.min(255, value * (0.45 + 0.65 * Math.max(0, light)))));
  context.beginPath();
  corners.forEach(({ place }, k) => (k ? context.lineTo(place[0], place[1]) : context.moveTo(place[0], place[1])));
  context.closePath();
  context.fillStyle = context.strokeStyle = cssColor(color);
  context.lineWidth = 0.6;
  context.fill();
  context.stroke();
}

function drawSurfaceLine(context, field, plane, { points, color, chosen }, angle) {
  const share = ([low, high], value) => (2 * (value - low)) / (high - low) - 1;
  const place = ([x, y]) => {
    const value = valueAt(field, plane, [x, y]);
    return value === null ? null : project([share(plane.x, x), share(plane.y, y), value / LEVELS], angle);
  };
  const dense = points.slice(1).flatMap(([x, y], k) => [...Array(16).keys()].map((n) =>
    [mix([points[k][0], x], n / 16), mix([points[k][1], y], n / 16)])).concat(points.slice(-1));
  const line = dense.map(place).filter((one) => one);
  for (const [ink, width] of [["#000", 4], [color, 2.2]]) {
    context.beginPath();
    line.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
    [context.strokeStyle, context.lineWidth] = [ink, width];
    context.stroke();
  }
  points.forEach((point, k) => {
    const at = place(point);
    if (at) drawDot(context, at, k === chosen ? 6 : 3.5, k === chosen ? "#D55E00" : color);
  });
}

function drawDot(context, [x, y], radius, color) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  [context.fillStyle, context.strokeStyle, context.lineWidth] = [color, "#000", 1];
  context.fill();
  context.stroke();
}
