// A JupyterLab extension without a build: pictures in outputs get the text alternative of their metadata, for screen
// readers. JupyterLab's own renderer of pictures does the drawing, and leaves the alternative out.
(() => {
  const MIME_TYPES = ["image/png", "image/jpeg", "image/gif"];
  let shared = {};

  // The module that the application shares under this name.
  async function load(name) {
    const versions = Object.values(shared[name]);
    return (await versions[0].get())();
  }

  // Let a renderer describe the picture that it has drawn.
  function describe(renderer, mimeType) {
    const draw = renderer.renderModel.bind(renderer);
    renderer.renderModel = async (model) => {
      await draw(model);
      const picture = renderer.node.querySelector("img");
      if (picture) picture.alt = model.metadata[mimeType]?.alt || "figure";
    };
    return renderer;
  }

  async function loadPlugin() {
    const { IRenderMimeRegistry } = await load("@jupyterlab/rendermime");
    return {
      id: "ebt-figures:plugin",
      autoStart: true,
      requires: [IRenderMimeRegistry],
      activate(app, registry) {
        for (const mimeType of MIME_TYPES) {
          const factory = registry.getFactory(mimeType);
          const createRenderer = (options) => describe(factory.createRenderer(options), options.mimeType);
          registry.addFactory({ ...factory, mimeTypes: [mimeType], createRenderer }, 0);
        }
      },
    };
  }

  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB["ebt-figures"] = {
    init(scope) { shared = scope; },
    async get() {
      const plugin = await loadPlugin();
      return () => ({ __esModule: true, default: plugin });
    },
  };
})();
