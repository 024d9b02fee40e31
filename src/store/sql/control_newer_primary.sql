-- Records a newer primary of a node, unless one as new is known or the node was registered anew.
-- $1 node  $2 registration  $3 system identifier  $4 timeline
update shardmq_control.node set system_identifier = $3, timeline = $4
 where node = $1 and registration = $2
   and (timeline is null or (system_identifier = $3 and timeline < $4))
returning node
