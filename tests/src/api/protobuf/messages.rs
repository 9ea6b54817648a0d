//! The fields of the messages that are decoded, by their numbers in the `generated.proto` files of `k8s.io/api`.

/// A field of a message.
pub(super) struct Field<'a> {
    pub(super) name: &'a str,
    /// `string`, `bytes`, `bool`, `int`, a message, or `Nothing` for what is not looked at.
    pub(super) kind: &'a str,
    pub(super) shape: Shape,
    /// Optional in Go, so that an empty value says something.
    pub(super) pointer: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    One,
    List,
    /// Of text to the field's kind.
    Map,
}

/// The field of this number; none if it is not in the table.
pub(super) fn field(message: &str, number: u64) -> Option<Field<'static>> {
    let (_, fields) = MESSAGES.iter().find(|(name, _)| *name == message)?;
    fields.split_whitespace().find_map(|field| {
        let (written, rest) = field.split_once(':')?;
        let (name, kind) = rest.split_once('=')?;
        (written.parse() == Ok(number)).then(|| shaped(name, kind))
    })
}

/// `[kind]` is a list, `{kind}` a map, `kind?` a pointer.
fn shaped(name: &'static str, kind: &'static str) -> Field<'static> {
    let inner = |start, end| kind.strip_prefix(start).and_then(|kind: &str| kind.strip_suffix(end));
    let (kind, shape) = match (inner('[', ']'), inner('{', '}')) {
        (Some(kind), _) => (kind, Shape::List),
        (_, Some(kind)) => (kind, Shape::Map),
        _ => (kind, Shape::One),
    };
    Field { name, kind: kind.trim_end_matches('?'), shape, pointer: kind.ends_with('?') }
}

/// `number:name=kind` of each field.
const MESSAGES: &[(&str, &str)] = &[
    ("Unknown", "1:typeMeta=TypeMeta 2:raw=bytes 3:contentEncoding=string 4:contentType=string"),
    ("TypeMeta", "1:apiVersion=string 2:kind=string"),
    // meta/v1
    (
        "ObjectMeta",
        "1:name=string 2:generateName=string 3:namespace=string 4:selfLink=string 5:uid=string \
         6:resourceVersion=string 7:generation=int 8:creationTimestamp=Time 9:deletionTimestamp=Time \
         10:deletionGracePeriodSeconds=int? 11:labels={string} 12:annotations={string} \
         13:ownerReferences=[OwnerReference] 14:finalizers=[string]",
    ),
    (
        "OwnerReference",
        "1:kind=string 3:name=string 4:uid=string 5:apiVersion=string 6:controller=bool? 7:blockOwnerDeletion=bool?",
    ),
    ("Time", "1:seconds=int? 2:nanos=int"),
    ("Quantity", "1:string=string"),
    ("IntOrString", "1:type=int 2:intVal=int? 3:strVal=string?"),
    ("LabelSelector", "1:matchLabels={string} 2:matchExpressions=[LabelSelectorRequirement]"),
    ("LabelSelectorRequirement", "1:key=string 2:operator=string 3:values=[string]"),
    (
        "DeleteOptions",
        "1:gracePeriodSeconds=int? 2:preconditions=Preconditions 3:orphanDependents=bool? 4:propagationPolicy=string \
         5:dryRun=[string]",
    ),
    ("Preconditions", "1:uid=string 2:resourceVersion=string"),
    // core/v1
    ("Namespace", "1:metadata=ObjectMeta 2:spec=NamespaceSpec 3:status=Nothing"),
    ("NamespaceSpec", "1:finalizers=[string]"),
    ("ConfigMap", "1:metadata=ObjectMeta 2:data={string} 3:binaryData={bytes} 4:immutable=bool?"),
    ("Secret", "1:metadata=ObjectMeta 2:data={bytes} 3:type=string 4:stringData={string} 5:immutable=bool?"),
    (
        "ServiceAccount",
        "1:metadata=ObjectMeta 2:secrets=[ObjectReference] 3:imagePullSecrets=[LocalObjectReference] \
         4:automountServiceAccountToken=bool?",
    ),
    (
        "ObjectReference",
        "1:kind=string 2:namespace=string 3:name=string 4:uid=string 5:apiVersion=string 6:resourceVersion=string \
         7:fieldPath=string",
    ),
    ("LocalObjectReference", "1:name=string"),
    ("Service", "1:metadata=ObjectMeta 2:spec=ServiceSpec 3:status=Nothing"),
    (
        "ServiceSpec",
        "1:ports=[ServicePort] 2:selector={string} 3:clusterIP=string 4:type=string 5:externalIPs=[string] \
         7:sessionAffinity=string 8:loadBalancerIP=string 9:loadBalancerSourceRanges=[string] 10:externalName=string \
         11:externalTrafficPolicy=string 12:healthCheckNodePort=int 13:publishNotReadyAddresses=bool \
         17:ipFamilyPolicy=string 18:clusterIPs=[string] 19:ipFamilies=[string] \
         20:allocateLoadBalancerNodePorts=bool? 21:loadBalancerClass=string 22:internalTrafficPolicy=string",
    ),
    (
        "ServicePort",
        "1:name=string 2:protocol=string 3:port=int 4:targetPort=IntOrString 5:nodePort=int 6:appProtocol=string",
    ),
    (
        "Event",
        "1:metadata=ObjectMeta 2:involvedObject=ObjectReference 3:reason=string 4:message=string 5:source=EventSource \
         6:firstTimestamp=Time 7:lastTimestamp=Time 8:count=int 9:type=string 10:eventTime=Time 11:series=EventSeries \
         12:action=string 13:related=ObjectReference 14:reportingComponent=string 15:reportingInstance=string",
    ),
    ("EventSource", "1:component=string 2:host=string"),
    ("EventSeries", "1:count=int 2:lastObservedTime=Time"),
    ("Binding", "1:metadata=ObjectMeta 2:target=ObjectReference"),
    ("PodTemplateSpec", "1:metadata=ObjectMeta 2:spec=PodSpec"),
    (
        "PodSpec",
        "2:containers=[Container] 3:restartPolicy=string 4:terminationGracePeriodSeconds=int? \
         5:activeDeadlineSeconds=int? 6:dnsPolicy=string 7:nodeSelector={string} 8:serviceAccountName=string \
         9:serviceAccount=string 10:nodeName=string 11:hostNetwork=bool 12:hostPID=bool 13:hostIPC=bool \
         16:hostname=string 17:subdomain=string 19:schedulerName=string 20:initContainers=[Container] \
         21:automountServiceAccountToken=bool? 24:priorityClassName=string 30:enableServiceLinks=bool?",
    ),
    (
        "Container",
        "1:name=string 2:image=string 3:command=[string] 4:args=[string] 5:workingDir=string 6:ports=[ContainerPort] \
         7:env=[EnvVar] 8:resources=ResourceRequirements 13:terminationMessagePath=string 14:imagePullPolicy=string \
         16:stdin=bool 17:stdinOnce=bool 18:tty=bool 20:terminationMessagePolicy=string",
    ),
    ("ContainerPort", "1:name=string 2:hostPort=int 3:containerPort=int 4:protocol=string 5:hostIP=string"),
    ("EnvVar", "1:name=string 2:value=string"),
    ("ResourceRequirements", "1:limits={Quantity} 2:requests={Quantity}"),
    // events.k8s.io/v1
    (
        "NewEvent",
        "1:metadata=ObjectMeta 2:eventTime=Time 3:series=EventSeries 4:reportingController=string \
         5:reportingInstance=string 6:action=string 7:reason=string 8:regarding=ObjectReference \
         9:related=ObjectReference 10:note=string 11:type=string 12:deprecatedSource=EventSource \
         13:deprecatedFirstTimestamp=Time 14:deprecatedLastTimestamp=Time 15:deprecatedCount=int",
    ),
    // apps/v1
    ("Deployment", "1:metadata=ObjectMeta 2:spec=DeploymentSpec 3:status=Nothing"),
    (
        "DeploymentSpec",
        "1:replicas=int? 2:selector=LabelSelector 3:template=PodTemplateSpec 4:strategy=DeploymentStrategy \
         5:minReadySeconds=int 6:revisionHistoryLimit=int? 7:paused=bool 9:progressDeadlineSeconds=int?",
    ),
    ("DeploymentStrategy", "1:type=string 2:rollingUpdate=RollingUpdate"),
    ("RollingUpdate", "1:maxUnavailable=IntOrString 2:maxSurge=IntOrString"),
    // batch/v1
    ("Job", "1:metadata=ObjectMeta 2:spec=JobSpec 3:status=Nothing"),
    (
        "JobSpec",
        "1:parallelism=int? 2:completions=int? 3:activeDeadlineSeconds=int? 4:selector=LabelSelector \
         5:manualSelector=bool? 6:template=PodTemplateSpec 7:backoffLimit=int? 8:ttlSecondsAfterFinished=int? \
         9:completionMode=string 10:suspend=bool?",
    ),
    ("CronJob", "1:metadata=ObjectMeta 2:spec=CronJobSpec 3:status=Nothing"),
    (
        "CronJobSpec",
        "1:schedule=string 2:startingDeadlineSeconds=int? 3:concurrencyPolicy=string 4:suspend=bool? \
         5:jobTemplate=JobTemplateSpec 6:successfulJobsHistoryLimit=int? 7:failedJobsHistoryLimit=int? 8:timeZone=string",
    ),
    ("JobTemplateSpec", "1:metadata=ObjectMeta 2:spec=JobSpec"),
    // rbac.authorization.k8s.io/v1
    ("Role", "1:metadata=ObjectMeta 2:rules=[PolicyRule]"),
    ("ClusterRole", "1:metadata=ObjectMeta 2:rules=[PolicyRule] 3:aggregationRule=AggregationRule"),
    ("AggregationRule", "1:clusterRoleSelectors=[LabelSelector]"),
    (
        "PolicyRule",
        "1:verbs=[string] 2:apiGroups=[string] 3:resources=[string] 4:resourceNames=[string] 5:nonResourceURLs=[string]",
    ),
    ("RoleBinding", "1:metadata=ObjectMeta 2:subjects=[Subject] 3:roleRef=RoleRef"),
    ("ClusterRoleBinding", "1:metadata=ObjectMeta 2:subjects=[Subject] 3:roleRef=RoleRef"),
    ("Subject", "1:kind=string 2:apiGroup=string 3:name=string 4:namespace=string"),
    ("RoleRef", "1:apiGroup=string 2:kind=string 3:name=string"),
    // coordination.k8s.io/v1
    ("Lease", "1:metadata=ObjectMeta 2:spec=LeaseSpec"),
    (
        "LeaseSpec",
        "1:holderIdentity=string 2:leaseDurationSeconds=int? 3:acquireTime=Time 4:renewTime=Time 5:leaseTransitions=int?",
    ),
    // policy/v1
    ("Eviction", "1:metadata=ObjectMeta 2:deleteOptions=DeleteOptions"),
    // authentication.k8s.io/v1
    ("TokenRequest", "1:metadata=ObjectMeta 2:spec=TokenRequestSpec 3:status=Nothing"),
    (
        "TokenRequestSpec",
        "1:audiences=[string] 3:boundObjectRef=BoundObjectReference 4:expirationSeconds=int?",
    ),
    ("BoundObjectReference", "1:kind=string 2:apiVersion=string 3:name=string 4:uid=string"),
    ("SelfSubjectReview", "1:metadata=ObjectMeta 2:status=Nothing"),
    // authorization.k8s.io/v1
    ("SelfSubjectAccessReview", "1:metadata=ObjectMeta 2:spec=SelfSubjectAccessReviewSpec 3:status=Nothing"),
    (
        "SelfSubjectAccessReviewSpec",
        "1:resourceAttributes=ResourceAttributes 2:nonResourceAttributes=NonResourceAttributes",
    ),
    ("SelfSubjectRulesReview", "1:metadata=ObjectMeta 2:spec=SelfSubjectRulesReviewSpec 3:status=Nothing"),
    ("SelfSubjectRulesReviewSpec", "1:namespace=string"),
    (
        "ResourceAttributes",
        "1:namespace=string 2:verb=string 3:group=string 4:version=string 5:resource=string 6:subresource=string \
         7:name=string",
    ),
    ("NonResourceAttributes", "1:path=string 2:verb=string"),
];

#[cfg(test)]
mod tests {
    use super::{MESSAGES, field};

    #[test]
    fn each_field_is_of_a_kind_that_is_known() {
        for (message, fields) in MESSAGES {
            for written in fields.split_whitespace() {
                let number = written.split(':').next().unwrap().parse().unwrap();
                let field = field(message, number).unwrap();
                let scalar = ["string", "bytes", "bool", "int", "Nothing"].contains(&field.kind);
                assert!(
                    scalar || MESSAGES.iter().any(|(name, _)| *name == field.kind),
                    "{message}: {written}"
                );
            }
        }
    }
}
